"""What FFN channels and their inputs do over a calibration text: measured once, kept in a file.

`statistics.py` is the file, `measuring.py` fills it, `prepared.py` brings it to a run. For scouts
`input_moments.py` measures what `compensated.py` rounds by. Imports nothing, since methods read the
first and the others read methods.
"""
