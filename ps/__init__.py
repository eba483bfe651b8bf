"""The server: a state machine of rounds, its log, its optimizers, its metrics and its Ray actor."""
