# Writes N images with Espressif's NVS partition generator in DIR: images per second, and one of them.
import hashlib, io, sys, time

sys.path.insert(0, sys.argv[1])
import nvs_partition_gen as generator

n = int(sys.argv[2])
certificate, key = bytes(i & 255 for i in range(900)), bytes(i & 255 for i in range(240))
entries = [
    ("identity", "namespace", "", ""),
    ("certificate", "data", "binary", certificate),
    ("key", "data", "binary", key),
    ("serial", "data", "string", "SN00000001"),
    ("scope", "data", "string", "0ne00112233"),
    ("endpoint", "data", "string", "global.azure-devices-provisioning.net"),
    ("version", "data", "u32", "1"),
]
start = time.perf_counter()
for _ in range(n):
    f = io.BytesIO()
    with generator.nvs_open(f, 0x2000, generator.Page.VERSION2) as nvs:  # and the page that stays free
        for e in entries:
            generator.write_entry(nvs, *e)
print(n / (time.perf_counter() - start), hashlib.sha256(f.getvalue()).hexdigest())
