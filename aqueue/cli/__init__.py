"""The command line: ``aqueue worker module:app`` and its siblings.

Exit codes: 0 done; 1 the answer is no (a task failed, nothing found); 2 the command, the app or the
configuration is wrong; 3 the broker or the result store can't be reached; 4 no result in time.
"""
