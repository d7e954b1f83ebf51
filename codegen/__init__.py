"""From a scheduled program to code that runs."""
