/*
 * touchmark_tlv.h: reads the stamp that touchmark writes to raw storage: an EEPROM, a partition, an offset of an image.
 *
 * C99, one header, no allocation, no library but <stddef.h>, <stdint.h> and <string.h>. Copy it into your firmware.
 *
 * The storage holds two copies of the stamp, in two slots of the same size, one after the other. Read both slots into memory
 * and let touchmark_tlv_newest choose; then ask for values:
 *
 *     static uint8_t slots[2][2048];
 *     touchmark_tlv stamp;
 *     const uint8_t *value;
 *     size_t length;
 *
 *     eeprom_read(OFFSET, slots, sizeof slots);
 *     if (touchmark_tlv_newest(&stamp, slots[0], slots[1], sizeof slots[0]) != TOUCHMARK_TLV_OK) { ... }
 *     if (touchmark_tlv_find(&stamp, TOUCHMARK_TLV_ID_SCOPE, &value, &length)) { ... }
 *
 * Values are parts of the slot that they were read from: they live as long as it does, and text among them has no ending
 * NUL. touchmark_tlv_copy_text makes a C string of one.
 *
 * Layout of a copy; numbers have their lowest octet first:
 *
 *     offset  size
 *          0     4  magic: "TMRK"
 *          4     1  version: 1
 *          5     1  0
 *          6     2  number of records
 *          8     4  total length in octets, magic and CRC included
 *         12     4  sequence number, from 1; the copy with the greater one is the newer
 *         16        records: type (2), length (2), value; types rise
 *       last     4  CRC-32 (IEEE 802.3) of everything before it
 *
 * Every function checks what it reads against the size that it was given: no octets, whatever they are, lead it outside.
 * The CRC finds accidents, not forgery.
 */
#ifndef TOUCHMARK_TLV_H
#define TOUCHMARK_TLV_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

/* Types of records. Text is UTF-8. */
#define TOUCHMARK_TLV_ID_SCOPE 1u              /* text */
#define TOUCHMARK_TLV_GLOBAL_ENDPOINT 2u       /* text: a host name */
#define TOUCHMARK_TLV_REGISTRATION_ID 3u       /* text */
#define TOUCHMARK_TLV_SERIAL 4u                /* text */
#define TOUCHMARK_TLV_CERTIFICATE_CHAIN 5u     /* certificates in DER one after another, the device's first */
#define TOUCHMARK_TLV_CERTIFICATE_CHAIN_PEM 6u /* the same in PEM */
#define TOUCHMARK_TLV_PRIVATE_KEY 7u           /* PKCS #8, DER */
#define TOUCHMARK_TLV_SYMMETRIC_KEY 8u         /* its octets */
#define TOUCHMARK_TLV_KEY_URI 9u               /* text: where the private key is instead */
#define TOUCHMARK_TLV_FIRST_USER 0x8000u       /* to 0xfffe: yours */

/* What opening says. */
#define TOUCHMARK_TLV_OK 0
#define TOUCHMARK_TLV_NONE 1    /* no magic: never written, or a write was cut off */
#define TOUCHMARK_TLV_DAMAGED 2 /* a magic, and something behind it that is not a stamp */
#define TOUCHMARK_TLV_VERSION 3 /* a stamp of a version that this header does not know */

#define TOUCHMARK_TLV_HEADER 16u
#define TOUCHMARK_TLV_CRC 4u

/* A stamp that was opened. The fields belong to the functions. */
typedef struct {
	const uint8_t *records; /* the first record */
	size_t length;          /* of all records, in octets */
	uint32_t sequence;      /* greater is newer */
} touchmark_tlv;

static inline uint16_t touchmark_tlv_u16(const uint8_t *p)
{
	return (uint16_t)(p[0] | (uint16_t)(p[1] << 8));
}

static inline uint32_t touchmark_tlv_u32(const uint8_t *p)
{
	return (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}

/* CRC-32 bit by bit: no table, for memory is shorter than time at start-up. */
static inline uint32_t touchmark_tlv_crc(const uint8_t *p, size_t n)
{
	uint32_t crc = 0xffffffffu;
	size_t i;
	int bit;

	for (i = 0; i < n; i++) {
		crc ^= p[i];
		for (bit = 0; bit < 8; bit++) {
			crc = (crc >> 1) ^ (0xedb88320u & (0u - (crc & 1u)));
		}
	}
	return crc ^ 0xffffffffu;
}

/*
 * Opens the copy in a slot of that size. On TOUCHMARK_TLV_OK the stamp is set, and all of its records were checked; else it
 * is not touched.
 */
static inline int touchmark_tlv_open(touchmark_tlv *stamp, const uint8_t *slot, size_t size)
{
	size_t total, end, at, n;
	uint32_t last = 0, type, count = 0;

	if (size < 4 || memcmp(slot, "TMRK", 4) != 0) {
		return TOUCHMARK_TLV_NONE;
	}
	if (size < TOUCHMARK_TLV_HEADER + TOUCHMARK_TLV_CRC) {
		return TOUCHMARK_TLV_DAMAGED;
	}
	if (touchmark_tlv_u32(slot + 8) > size) {
		return TOUCHMARK_TLV_DAMAGED;
	}
	total = (size_t)touchmark_tlv_u32(slot + 8);
	if (total < TOUCHMARK_TLV_HEADER + TOUCHMARK_TLV_CRC) {
		return TOUCHMARK_TLV_DAMAGED;
	}
	end = total - TOUCHMARK_TLV_CRC;
	if (touchmark_tlv_crc(slot, end) != touchmark_tlv_u32(slot + end)) {
		return TOUCHMARK_TLV_DAMAGED;
	}
	if (slot[4] != 1 || slot[5] != 0) {
		return TOUCHMARK_TLV_VERSION;
	}
	for (at = TOUCHMARK_TLV_HEADER; at < end; at += n) {
		if (end - at < 4) {
			return TOUCHMARK_TLV_DAMAGED;
		}
		type = touchmark_tlv_u16(slot + at);
		n = (size_t)touchmark_tlv_u16(slot + at + 2);
		at += 4;
		if (n == 0 || n > end - at || type <= last || type == 0xffffu) {
			return TOUCHMARK_TLV_DAMAGED;
		}
		last = type;
		count++;
	}
	if (count != touchmark_tlv_u16(slot + 6) || touchmark_tlv_u32(slot + 12) == 0) {
		return TOUCHMARK_TLV_DAMAGED;
	}
	stamp->records = slot + TOUCHMARK_TLV_HEADER;
	stamp->length = end - TOUCHMARK_TLV_HEADER;
	stamp->sequence = touchmark_tlv_u32(slot + 12);
	return TOUCHMARK_TLV_OK;
}

/*
 * Opens the newer of two copies, each in a slot of that size. One that is damaged, or not there, does not count. If neither
 * does, the answer is the worse of the two: damaged rather than none.
 */
static inline int touchmark_tlv_newest(touchmark_tlv *stamp, const uint8_t *first, const uint8_t *second, size_t size)
{
	touchmark_tlv other;
	int a = touchmark_tlv_open(stamp, first, size);
	int b = touchmark_tlv_open(&other, second, size);

	if (b == TOUCHMARK_TLV_OK && (a != TOUCHMARK_TLV_OK || other.sequence > stamp->sequence)) {
		*stamp = other;
		return TOUCHMARK_TLV_OK;
	}
	if (a == TOUCHMARK_TLV_OK) {
		return TOUCHMARK_TLV_OK;
	}
	return a > b ? a : b;
}

/* Finds the value of a type. Returns 1 and sets value and length, or returns 0 and leaves them. */
static inline int touchmark_tlv_find(const touchmark_tlv *stamp, uint16_t type, const uint8_t **value, size_t *length)
{
	size_t at = 0, n;

	while (stamp->length - at >= 4) {
		n = (size_t)touchmark_tlv_u16(stamp->records + at + 2);
		if (n > stamp->length - at - 4) {
			return 0; /* the octets changed after they were opened */
		}
		if (touchmark_tlv_u16(stamp->records + at) == type) {
			*value = stamp->records + at + 4;
			*length = n;
			return 1;
		}
		at += 4 + n;
	}
	return 0;
}

/* Copies a value and an ending NUL to text, which has room for size octets. Returns 1, or 0 if it is not there or too long. */
static inline int touchmark_tlv_copy_text(const touchmark_tlv *stamp, uint16_t type, char *text, size_t size)
{
	const uint8_t *value;
	size_t length;

	if (!touchmark_tlv_find(stamp, type, &value, &length) || length >= size) {
		return 0;
	}
	memcpy(text, value, length);
	text[length] = '\0';
	return 1;
}

#endif
