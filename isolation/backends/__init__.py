"""The backends that come with isolation-kit. The core finds them through pluggy, as it finds anyone else's."""
