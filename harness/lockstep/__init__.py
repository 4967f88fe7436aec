"""Runs a program on a machine and on the model, and compares at every VMRUN and every #VMEXIT.

    stub      what L2's code does around a probe: the model of our own L2
    state     what the model keeps between VMRUNs
    delivery  how L2 leaves, and how the delivery of an event reaches memory
    l2        L2 between VMRUN and #VMEXIT
    registers, instructions   what its probes do that are no accesses to memory
    stale     which of the permitted walks a machine took, where its TLB leaves a choice
    quirks    known ways in which a machine's MMU differs from the manual's
    twin      the program run on the model: a prediction for each VMRUN
    rehearse  a program on the model alone, before a machine sees it
    compare   the checks C1 to C3: a record against the twin's prediction
    contexts  the check C4: the MMU context of the hypervisor under L1, by its kernel's trace
    audit     the check C5: every entry of the tables that it runs guests with
    errata    divergences that are known
    coverage  what was put to the test: the model's cells, as predictions are checked
    driver    feeds programs to a machine, and its records to the checks
"""
