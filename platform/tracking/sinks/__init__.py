"""Trackers beside TensorBoard (`tracking.sinks`): wandb, trackio, mlflow, or one of the user's own.

    Recorder ── rows, scores, texts ──► Worker (a thread and a bounded queue each) ──► Sink: start, write, text, close

The Recorder stays the only truth: what a sink has is a copy, which may lack rows, and nothing is ever read from it.
"""
