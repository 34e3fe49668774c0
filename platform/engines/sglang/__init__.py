"""The SGLang engine: servers.py starts and watches real SGLang servers (serve.py, one process tree each)."""
