/* L1's second processor, as the first one sees it. */
#pragma once
#include "wire.h"

void second_queue(const struct tw_op *op);	/* one more write to do */
void second_start(void *mailbox);		/* wake it: it waits for L2's request in the mailbox */
void second_stop(void);				/* wait until it stands still again; what it has not done it will not do */
