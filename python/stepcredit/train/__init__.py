"""The trainer: `python -m stepcredit.train RECIPE field=value ...`."""
