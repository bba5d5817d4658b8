"""Plans a train step without its hardware: memory, FLOPs, communication, checkpoints. Independent of the model.

XLA compiles for a topology whose devices need not exist. The sizes and counts are those of the compiled step. Times
are estimates from the rates in `hardware` and from flags.

May import EasyLM.parallel, EasyLM.checkpoints and EasyLM.training.

    topologies   the text of --topology -> devices that need not exist
    hardware     data sheet values of devices
    matmuls      FLOPs of matrix products in a traced step; arrays as large as attention weights
    hlo          instructions of a compiled step, and how often each is executed
    collectives  bytes of communication in a compiled step
    plan         compiles a step; the plan of it
    estimates    seconds of a step and of a save
    search       the fastest settings that fit
    report       plans as text

Vocabulary:
    topology     the kind, number and arrangement of devices, such as v5p:2x2x2
    slice        TPU devices with their own fast network; several slices communicate over a slower network
    node         GPUs of one host, with their own fast network
    trips        how often a loop executes its body
"""
