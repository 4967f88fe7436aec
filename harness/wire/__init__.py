"""What is shared with the guests, and with the kernel below them.

    layout    the records, one table of them
    header    the guests' C header, made from that
    image     where things are in the guest's memory
    program   ops for L1, encoded
    records   a record that L1 posted, decoded
    channel   the two rings between the two
    stop      what is seen of a foreign L1 at its VMRUNs and behind them
    trace     what the kernel that runs L1 tells of itself
"""
