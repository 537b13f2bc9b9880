"""A module with state, as real projects have."""

debug = False
