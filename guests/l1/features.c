/*
 * What this CPU has, as far as it matters to nested paging and to L2's probes.
 */
#include "l1.h"

uint64_t features(void)
{
	uint32_t a, b, c, d;
	uint64_t have = 0;

	cpuid(1, &a, &b, &c, &d);
	have |= c >> 17 & 1 ? TW_FEATURE_PCID : 0;
	have |= c >> 26 & 1 ? TW_FEATURE_XSAVE : 0;
	have |= d >> 9 & 1 && (b >> 16 & 0xff) > 1 ? TW_FEATURE_SECOND : 0;
	cpuid(7, &a, &b, &c, &d);
	have |= b & 1 ? TW_FEATURE_FSGSBASE : 0;
	have |= c >> 7 & 1 ? TW_FEATURE_CET : 0;
	have |= b >> 7 & 1 ? TW_FEATURE_SMEP : 0;
	have |= b >> 20 & 1 ? TW_FEATURE_SMAP : 0;
	have |= c >> 2 & 1 ? TW_FEATURE_UMIP : 0;
	have |= c >> 3 & 1 ? TW_FEATURE_PKU : 0;
	have |= c >> 16 & 1 ? TW_FEATURE_LA57 : 0;
	cpuid(0x80000001, &a, &b, &c, &d);
	have |= d >> 20 & 1 ? TW_FEATURE_NX : 0;
	have |= d >> 26 & 1 ? TW_FEATURE_PAGE1G : 0;
	have |= d >> 25 & 1 ? TW_FEATURE_FFXSR : 0;
	have |= c >> 17 & 1 ? TW_FEATURE_TCE : 0;
	cpuid(0x80000008, &a, &b, &c, &d);
	have |= b >> 8 & 1 ? TW_FEATURE_MCOMMIT : 0;
	have |= b >> 13 & 1 ? TW_FEATURE_INTWB : 0;
	have |= b >> 20 & 1 ? 0 : TW_FEATURE_LMSLE;	/* the bit says that it is not there */
	cpuid(0x80000000, &a, &b, &c, &d);
	if (a >= 0x80000021) {
		cpuid(0x80000021, &a, &b, &c, &d);
		have |= a >> 7 & 1 ? TW_FEATURE_UAI : 0;
		have |= a >> 8 & 1 ? TW_FEATURE_AIBRS : 0;
	}
	cpuid(0x8000000a, &a, &b, &c, &d);
	have |= d >> 1 & 1 ? TW_FEATURE_LBRV : 0;
	have |= d >> 3 & 1 ? TW_FEATURE_NRIPS : 0;
	have |= d >> 6 & 1 ? TW_FEATURE_FLUSHBYASID : 0;
	have |= d >> 13 & 1 ? TW_FEATURE_AVIC : 0;
	have |= d >> 17 & 1 ? TW_FEATURE_GMET : 0;
	have |= d >> 18 & 1 ? TW_FEATURE_X2AVIC : 0;
	have |= d >> 19 & 1 ? TW_FEATURE_SSS : 0;
	have |= d >> 25 & 1 ? TW_FEATURE_VNMI : 0;
	have |= c >> 6 & 1 ? TW_FEATURE_X2AVIC_EXT : 0;
	return have;
}
