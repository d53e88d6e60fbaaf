"""What is computed: modules, layers, and the weights each of them has."""
