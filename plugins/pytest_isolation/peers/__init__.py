"""All that is known of other plug-ins: one module each, and what they have in common (carrier.py, carriers.py).

A module's inside half runs in the sandbox, where it makes data of what the plug-in keeps there; its host half checks
that, and does what the plug-in itself would have done.
"""
