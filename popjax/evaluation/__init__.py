"""Evaluation: tasks and texts scored under two named protocols, each method against dense.

`scoring.py` turns token pairs into log-likelihoods; `local_tasks.py` and `perplexity.py` use it
for files, `harness.py` for lm-eval's tasks through the model class of `lm.py`, the only file that
needs the extra `eval` to be imported. Leaves out how fast anything is: that is `popjax bench`.
"""
