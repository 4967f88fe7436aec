"""Runs a program on a machine and on the model, and compares at every VMRUN and every #VMEXIT.

The model's side:

    twin      the program run on the model: a prediction for each VMRUN
    prediction   what one VMRUN comes to
    state     what the model keeps between VMRUNs
    stub      what L2's code does around a probe: the model of our own L2
    l2        L2 between VMRUN and #VMEXIT
    registers, instructions, devices, vm_state   what its probes do that are no accesses to RAM
    translation, stale   how its accesses are translated; which of the permitted walks a machine took
    delivery  how L2 leaves, and how the delivery of an event reaches memory
    rehearse  a program on the model alone, before a machine sees it

The checks:

    driver    feeds programs to a machine, and its records to the checks
    compare   C1 to C3: a record against the twin's prediction
    contexts  C4: the MMU context of the hypervisor under L1, by its kernel's trace
    audit     C5: every entry of the tables that it runs guests with
    result, tally   what came of a scenario, and of a sweep
    coverage  what was put to the test: the model's cells, as predictions are checked
    signature    what is wrong, without where

What is known:

    errata    divergences that are known
    quirks, active, kept_format   known ways in which a machine's MMU differs from the manual's; those in force
    blame     whose a divergence is
    hazards   what a machine does not survive

A foreign L1, which runs no program of ours:

    observe   each VMRUN and #VMEXIT as it comes
    exits     what one #VMEXIT must be
    nested_tables, flushes   what changed in its nested tables; whether it flushes what it must
    evidence, audited   what a finding was made of; what one in the tables of the KVM under it was
"""
