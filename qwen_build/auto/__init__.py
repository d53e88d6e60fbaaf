"""``--quant auto``: a scheme for every linear, within a budget."""
