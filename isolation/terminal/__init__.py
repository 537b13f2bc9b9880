"""The streams of a command that `isolation run` or `isolation pytest` runs, between the caller's terminal and the sandbox.

relay.py            which descriptors the command gets, and the loop that passes on all the others
pump.py             bytes from one descriptor to another
host_terminal.py    the caller's terminal: raw meanwhile, and always put back
control_strings.py  what a terminal is not told, as it would do more than show it
"""
