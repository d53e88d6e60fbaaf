"""Measurements anyone can repeat; they assert nothing and print what they mean. Last outputs in results/."""
