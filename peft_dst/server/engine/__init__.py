"""The one thread that computes: takes in requests for many deltas, and batches those that can go together.

* `requests`  what it is asked for
* `loading`   deltas that are read meanwhile
* `desk`      requests from when they are submitted until they have ended
* `companies` which deltas may be in one batch
* `plans`     what goes together in one
* `halving`   batches that fail
* `rounds`    new texts are read, and everybody's next token is made
* `thread`    the thread

A request comes to the desk, where it waits for its delta to be read, and from where the thread takes it into a round; there
it is planned with others, computed, and told its end by the desk.
"""

from .requests import Classify, Full, Generate, Request, Stopped, Unavailable
from .thread import Engine


__all__ = ["Classify", "Engine", "Full", "Generate", "Request", "Stopped", "Unavailable"]
