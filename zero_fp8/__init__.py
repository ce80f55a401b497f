"""Who owns which bytes, and when they travel.

A gradient's way: hook -> bucket -> messages -> exchange -> reduced gradient.

    gradients.reducer -> gradients.packing -> gradients.exchange -> gradients.reduced -> verdict -> step

A weight's way: shard -> sweep -> gather -> parameter.

    step -> states.shard (writes its rows of weights.views) -> weights.store -> comm.collectives

`wiring` builds the parts of both ways and alone chooses which; `handlers` answers DeepSpeed's engine, and
`handlers.take_over` makes fleets and process groups. `placement` says who owns what, `comm` has groups and
collectives, `recipe` is the config as plain values, `health` counts what rounding did, `checkpoint` writes
and reads the states, `offload` places them in host memory, `optimizer` holds the hyperparameters and is
FP8AdamW without DeepSpeed.

One meaning per word:

    parameter          a tensor that is trained; its index is its position among all parameters of the model
    fleet              the ranks that hold the same copy of a parameter and share its states
    part, peers        what a rank has of a split model, by number, and the ranks with the parts of a replica
    replicated         what peers hold alike; the first of them counts it
    bucket             parameters whose gradients travel together: of one dtype, param group and fleet, all
                       replicated or none
    slot               a parameter's position in a bucket
    block              consecutive elements of one parameter; what has a scale
    row                a block in a two-dimensional tensor of codes, of states or of weights
    piece              the blocks of one parameter that one rank owns
    owner              the rank that adds up a block's gradients and keeps its states
    shard              an owner's Adam states of a bucket
    reduced gradient   an owner's sum of a bucket's gradients, over ranks and rounds
    round              each bucket exchanged once, by the end of a backward (ZeRO 2) or of a step (ZeRO 1)
    late gradient      one that came after its bucket had left, or in a backward that exchanges nothing
    message            what one rank sends to one owner of a bucket: codes, then scales if they differ by rank
    hop                a message's travel inside a node, or between nodes
    node, place        ranks with a fast link between them, and a rank's number among them
    exchange           a bucket's messages under way, in one hop or two
    sweep              one pass over a shard: gradient and states in, states and weights out
    gather             every owner's weights of a bucket, on their way to all ranks
    verdict            norm, clip factor and whether to step, the same on every rank
    settle             count a step or a skip, once the host knows the verdict
    lend               give access to states for as long as a `with` lasts, wherever they live
    residence          where shards' states live: on the device, or in host memory (offload)
    executor           who sweeps states that live in host memory: the device (stream) or the host
    chunk              rows of a shard that an executor sweeps at a time; a visit is one that is ready
    landing            a reduced gradient's way to host memory, if the host sweeps

Invariants, each with a test: integers decide who owns what (`placement`); a block is the same bytes wherever
it lives; a value goes one way; axes are fields that `wiring` composes, not subclasses; the device decides
whether to step and the host reads it last.
"""
