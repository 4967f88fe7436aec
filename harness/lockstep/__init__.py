"""Runs a program on a machine and on the model, and compares at every VMRUN and every #VMEXIT.

    stub      what L2's code does around a probe: the model of our own L2
    twin      the program run on the model
    compare   the checks C1 to C3: a record against the twin's prediction
    driver    feeds programs to a machine, and its records to the checks
"""
