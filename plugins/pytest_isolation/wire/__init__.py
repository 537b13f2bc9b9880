"""What both sides know: the messages between a test's sandbox and pytest, as data that is checked and cleaned."""
