"""The server: a base and its deltas over HTTP (docs/serving.md). Needs the extra `serve`.

* `sampling` how the next token is picked
* `cohorts`  sequences that are continued together
* `classifier` texts that are classified together
* `engine`   the one thread that computes
* `protocol` what clients send
* `service`  texts, limits, deltas that come and go
* `app`      routes, errors, metrics
* `logs`     what is written to stderr
* `start`    from a command's options to a running server
"""
