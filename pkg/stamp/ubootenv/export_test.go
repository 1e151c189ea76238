package ubootenv

import "hash/crc32"

// FixCRC writes the right CRC into an image.
func FixCRC(l Layout, image []byte) {
	if header, err := l.header(); err == nil {
		l.order().PutUint32(image, crc32.ChecksumIEEE(image[header:]))
	}
}
