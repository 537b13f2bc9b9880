"""What both sides of a kernel speak: its connection, the relay of its channels, the stream to a virtual machine."""
