"""The file tree of a sandbox: decided on the host, built by the new process, looked at by the host again."""
