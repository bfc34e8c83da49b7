"""The server: a base and its deltas over HTTP (docs/serving.md). Needs the extra `serve`.

* `sampling`   how the next token is picked
* `cohorts`    sequences that are continued together
* `classifier` texts that are classified together
* `engine/`    the one thread that computes: from requests to batches, round by round
* `protocol`   what clients send
* `limits`     what they may ask for
* `texts`      from texts to tokens and back
* `labels`     what classifiers say
* `folder`     deltas that come and go
* `service`    a base with its deltas, asked and answered in time
* `observing`  metrics, the log
* `errors`     what clients are told of them
* `answers`    whole ones and streams
* `receiving`  bodies and uploads
* `access`     who may upload and remove
* `app`        the routes
* `logs`       what is written to stderr
* `start`      from a command's options to a running server
"""
