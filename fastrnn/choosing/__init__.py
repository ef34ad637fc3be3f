"""Which way computes a call, and why: by what can run, and by what is fastest."""
