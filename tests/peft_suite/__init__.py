"""PEFT's own tests, run against DST from outside: `python -m tests.peft_suite /path/to/peft` (see README.md here)."""
