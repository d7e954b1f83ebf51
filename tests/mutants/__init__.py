"""Passes with one mistake each: what the verifier must refuse, and the rest of the suite must notice."""
