"""What runs in the sandbox: an ordinary ipykernel that takes the five sockets it was given instead of making its own."""
