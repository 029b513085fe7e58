"""What FFN channels and their inputs do over a calibration text: measured once, kept in a file.

`statistics.py` is the file, `measuring.py` fills it, `prepared.py` brings it to a run. Imports
nothing, since methods read the first and the others read methods.
"""
