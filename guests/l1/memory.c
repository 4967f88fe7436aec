/*
 * L1's memory: tables and data, with a copy of each page in which L1 remembers what it held when L1 last looked.
 */
#include "l1.h"

/* From l1.ld: the tables, the data pages, and the copies in which L1 remembers both. */
extern uint8_t tw_arena[], tw_arena_end[], tw_data[], tw_data_end[], tw_mirror_offset[];

enum { ARENA_PAGES = 512, DATA_PAGES = 1536, BANK_PAGES = ARENA_PAGES + DATA_PAGES, MAX_PAGES = 2 * BANK_PAGES };
static uint64_t *watched[MAX_PAGES];
static uint32_t watched_count;
static uint64_t *touched[MAX_PAGES];
static uint32_t touched_count;
static uint8_t is_touched[MAX_PAGES];

/* What quadwords held before they were changed, since the mark: a rewind puts them back, last first. */
enum { UNDO = 1 << 14 };
static struct { uint64_t *at, value; } undo[UNDO];
static uint32_t undo_count;

/* Both banks are the same but for 4 GiB (tw_high in l1.ld): where p is in the low one. */
static const uint64_t HIGH = 1ull << 32;

static inline const uint8_t *low(const void *p)
{
	return (const uint8_t *)((uint64_t)p & ~HIGH);
}

static inline int in_data(const void *p)
{
	return low(p) >= tw_data && low(p) < tw_data_end;
}

static inline int has_mirror(const void *p)
{
	return (low(p) >= tw_arena && low(p) < tw_arena_end) || in_data(p);
}

static inline uint64_t *mirror(uint64_t *p)
{
	return p + (uint64_t)tw_mirror_offset / 8;
}

/* What a data page holds: each quadword is its own name, and code that returns it to L2's stub. */
static inline uint64_t tag(const void *p)
{
	return 0x90e3ff00000000b8 | (uint64_t)p >> 3 << 8;	/* mov $sPA/8, %eax; jmp *%rbx; nop */
}

static inline uint32_t page_index(const uint64_t *page)
{
	uint32_t bank = low(page) == (const uint8_t *)page ? 0 : BANK_PAGES;

	return bank + (in_data(page) ? ARENA_PAGES + (low(page) - tw_data) / PAGE : (low(page) - tw_arena) / PAGE);
}

static void touch(uint64_t *page)
{
	uint32_t index = page_index(page);

	if (!is_touched[index]) {
		is_touched[index] = 1;
		touched[touched_count++] = page;
	}
}

static void remember(uint64_t *at, uint64_t value)
{
	if (undo_count < UNDO) {	/* a machine that changes more is found out at the next SYNC */
		undo[undo_count].at = at;
		undo[undo_count++].value = value;
	}
}

void memory_mark(void)
{
	undo_count = 0;
}

void memory_rewind(void)
{
	while (undo_count) {
		uint64_t *at = undo[--undo_count].at;

		*at = *mirror(at) = undo[undo_count].value;
	}
}

void memory_watch(uint64_t page)
{
	watched[watched_count++] = (uint64_t *)page;
}

void memory_reset(void)
{
	undo_count = 0;
	for (uint32_t i = 0; i < touched_count; i++) {
		uint64_t *page = touched[i];

		if (in_data(page))
			for (int w = 0; w < PAGE / 8; w++)
				page[w] = tag(page + w);
		else
			fill64(page, 0, PAGE);
		copy64(mirror(page), page, PAGE);
		is_touched[page_index(page)] = 0;
	}
	touched_count = 0;
	watched_count = 0;
}

void memory_write(uint64_t address, uint64_t value, uint32_t width)
{
	volatile void *p = (volatile void *)address;
	uint64_t *word = (uint64_t *)(address & -8ull);

	if (has_mirror(word))
		remember(word, *word);
	switch (width) {
	case 1: *(volatile uint8_t *)p = value; break;
	case 2: *(volatile uint16_t *)p = value; break;
	case 4: *(volatile uint32_t *)p = value; break;
	default: *(volatile uint64_t *)p = value; break;
	}
	if (has_mirror(word)) {
		*mirror(word) = *(volatile uint64_t *)word;
		touch((uint64_t *)(address & -(uint64_t)PAGE));
	}
}

/* Fill in what changed in the watched pages since L1 last looked. */
void memory_find_changes(struct tw_record *record)
{
	uint32_t found = 0;

	for (uint32_t i = 0; i < watched_count; i++) {
		volatile uint64_t *page = watched[i];
		uint64_t *old = mirror(watched[i]);

		for (int w = 0; w < PAGE / 8; w += 8) {
			if (!((page[w] ^ old[w]) | (page[w + 1] ^ old[w + 1]) |
			      (page[w + 2] ^ old[w + 2]) | (page[w + 3] ^ old[w + 3]) |
			      (page[w + 4] ^ old[w + 4]) | (page[w + 5] ^ old[w + 5]) |
			      (page[w + 6] ^ old[w + 6]) | (page[w + 7] ^ old[w + 7])))
				continue;
			for (int v = w; v < w + 8; v++) {
				uint64_t now = page[v];

				if (now == old[v])
					continue;
				if (found < TW_MAX_DIFFS) {
					record->diffs[found].address = (uint64_t)&page[v];
					record->diffs[found].value = now;
				}
				found++;
				remember((uint64_t *)&page[v], old[v]);
				old[v] = now;
				touch(watched[i]);
			}
		}
	}
	record->diffs_found = found;
}
