"""Files of a live sandbox, kept and restored: by a helper of the supervisor, which exchanges the sandbox's overlays."""
