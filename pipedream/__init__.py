"""Optional commands on top of pipedream_simple.py: python -m pipedream lists them."""
