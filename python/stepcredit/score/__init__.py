"""`python -m stepcredit.score`: information gain of the searches in a log, whichever framework wrote it.

A log is a JSON Lines file, one rollout a line (`schemas/rollout.schema.json`, read by `records` and `rollouts`). Its
rollouts are scored in windows (`windows`) under `options`, and each has a line in the output
(`schemas/gains.schema.json`), which `journal` keeps so that a run that was stopped can go on.
"""
