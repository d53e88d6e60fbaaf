"""Data in, tables, pages and plots out."""
