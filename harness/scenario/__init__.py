"""What to run: the op vocabulary, scenario files, and the world that a scenario starts in.

    ops       what a scenario can say, and how probes are written
    files     scenario files (TOML): reading them, with the line of every mistake
    world     the tables, the VMCB and the names that each scenario starts with
    program   a scenario turned into the ops that L1 interprets
"""
