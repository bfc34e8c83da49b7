"""`python -m peft_dst`: the command line."""

from .cli import main


main()
