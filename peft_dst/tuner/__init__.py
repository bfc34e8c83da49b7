"""The method as PEFT's tuner contract has it: markers beside a base's modules, adapters in them, and what models can do.

* `targets`   which parameters an adapter tunes
* `entries`   where one adapter's tensors live in a host: records, and float32 copies while they are trained
* `overlay`   saved adapters over quantised linear layers: corrections of their outputs
* `sums`      what records come to in one weight: scaled, several added up
* `records`   the records of a host and its live weights, which follow one another
* `states`    how those records get into state dicts and out of them
* `layer`     the marker child: PEFT's layer contract over records
* `constraints`  what is found on a model: its adapters' constraints, the processes that hold its weights together
* `exchange`  between the markers and adapter state dicts; what is checked before anything is loaded
* `parallel`  what processes tell each other before they train, and what DDP is not to send
* `mixed`     several adapters in one batch, by `mixing`
* `static`    subsets that are given: by a static selection, or by another adapter
* `weighted`  an adapter from several: weighted sums, TIES, DARE
* `plan`      an adapter that is about to be added, checked
* `model`     DSTModel: places the markers, owns the constraints
* `settling`  what was loaded is checked, and comes into the weights
* `bare`      state dicts of tuned weights without what markers write beside them are not taken for a new seed
* `hotswap`   another adapter in the place of one that is loaded
* `rescale`   adapters at a part of their strength
* `card`      the model card
* `saving`    an adapter's files take their places together
"""
