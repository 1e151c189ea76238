# Runs Espressif's NVS partition generator, and ESP-IDF's parser for its images, for the tests: one JSON object per line in,
# one out. The argument is the directory that scripts/espressif-nvs prints.
import argparse, base64, io, json, os, sys, tempfile

sys.path.insert(0, sys.argv[1])
import nvs_check, nvs_parser
import nvs_partition_gen as generator

out = sys.stdout
sys.stdout = open(os.devnull, "w")


class Log:
    """What the checks would print in a colour of warning."""

    def __init__(self):
        self.complaints = []

    def info(self, *args, **kwargs):
        pass

    def warn(self, text):
        self.complaints.append(text)
        return text

    def calm(self, text):
        return text

    red = yellow = warn
    cyan = green = bold = calm


def rows(q):
    """Entries through the generator's own interface: [key, type, encoding, value, namespace number]."""
    f = io.BytesIO()
    size, read_only = generator.check_size(str(q["size"]))
    with generator.nvs_open(f, size, generator.Page.VERSION2, is_encrypt="key" in q, key=bytes.fromhex(q.get("key", "")), read_only=read_only) as nvs:
        for key, kind, encoding, value, ns in q["rows"]:
            generator.write_entry(nvs, key, kind, encoding, value, ns)
    return f.getvalue()


def csv(q):
    """A CSV file through its command, in the directory of the files."""
    os.chdir(q["dir"])
    with tempfile.TemporaryDirectory() as d:
        with open(d + "/in.csv", "w", encoding="utf8", newline="") as f:
            f.write(q["csv"])
        args = argparse.Namespace(input=[d + "/in.csv"], output=d + "/out.bin", size=str(q["size"]), version=2, outdir=d)
        if "key" in q:
            with open(d + "/keys.bin", "wb") as f:
                f.write(bytes.fromhex(q["key"]))
            args.inputkey, args.keygen, args.keyfile = d + "/keys.bin", False, None
            generator.encrypt(args)
        else:
            generator.generate(args)
        return open(d + "/out.bin", "rb").read()


def keys(q):
    """A key partition: with keys that the generator makes, or derives from a chip's HMAC key."""
    with tempfile.TemporaryDirectory() as d:
        with open(d + "/hmac.bin", "wb") as f:
            f.write(bytes.fromhex(q.get("key", "")))
        generator.generate_key(argparse.Namespace(keyfile="k.bin", outdir=d, key_protect_hmac="key" in q, kp_hmac_keygen=False, kp_hmac_inputkey=d + "/hmac.bin"))
        return open(d + "/keys/k.bin", "rb").read()


def decrypt(q):
    with tempfile.TemporaryDirectory() as d:
        for name, data in (("in", base64.b64decode(q["image"])), ("keys", bytes.fromhex(q["key"]))):
            with open(f"{d}/{name}.bin", "wb") as f:
                f.write(data)
        generator.decrypt(argparse.Namespace(input=d + "/in.bin", key=d + "/keys.bin", output=d + "/out.bin", outdir=d))
        return open(d + "/out.bin", "rb").read()


def parse(image):
    """What ESP-IDF's parser finds in an image, and what its checks have to say."""
    partition, log = nvs_parser.NVS_Partition("image", bytearray(image)), Log()
    partition.raw_data = image
    nvs_check.integrity_check(partition, log)
    spaces, chunks, items = {}, {}, []
    for page in partition.pages:
        for e in page.entries:
            ns, kind = e.metadata["namespace"], e.metadata["type"]
            octets = b"".join(bytes(c.raw) for c in e.children)[: (e.data or {}).get("size", 0)]
            if e.state != "Written":
                continue
            if ns == 0:
                spaces[e.data["value"]] = e.key
            elif kind == "blob_data":
                chunks[ns, e.key, e.metadata["chunk_index"]] = octets
            elif kind == "string":
                items.append([ns, e.key, kind, octets.hex()])
            elif kind == "blob_index":
                items.append([ns, e.key, "blob", [e.data["chunk_start"] + i for i in range(e.data["chunk_count"])]])
            else:
                items.append([ns, e.key, kind, str(e.data["value"])])
    for i in items:
        if i[2] == "blob":
            i[3] = b"".join(chunks[i[0], i[1], c] for c in i[3]).hex()
        i[0] = spaces[i[0]]
    return {"values": items, "complaints": log.complaints}


for line in sys.stdin:
    q = json.loads(line)
    try:
        if q["do"] == "parse":
            a = parse(base64.b64decode(q["image"]))
        else:
            image = {"rows": rows, "csv": csv, "keys": keys, "decrypt": decrypt}[q["do"]](q)
            a = {"image": base64.b64encode(image).decode()}
    except BaseException as e:
        a = {"error": f"{type(e).__name__}: {e}"}
    print(json.dumps(a), file=out, flush=True)
