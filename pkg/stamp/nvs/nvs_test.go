package nvs

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"reflect"
	"slices"
	"strings"
	"testing"
	"testing/fstest"
)

// testKeys are plainly no device's.
func testKeys(t testing.TB) *Keys {
	octets := make([]byte, KeySize)
	for i := range octets {
		octets[i] = byte(i)
	}
	keys, err := NewKeys(octets)
	if err != nil {
		t.Fatal(err)
	}
	return keys
}

// goldenKeys are of a key partition that Espressif's generator made.
func goldenKeys(t testing.TB) *Keys {
	keys, err := ParseKeys(read(t, "keys.bin"))
	if err != nil {
		t.Fatal(err)
	}
	return keys
}

func read(t testing.TB, name string) []byte {
	data, err := os.ReadFile("testdata/" + name)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func build(t testing.TB, size int, entries []Entry, keys *Keys) []byte {
	t.Helper()
	image, err := Build(nil, size, entries, keys)
	if err != nil {
		t.Fatal(err)
	}
	return image
}

// The golden images are Espressif's: testdata/PROVENANCE says how they were made, TestGoldenAgain makes them again.
var golden = []string{"numbers", "strings", "blobs", "multipage", "wifi"}

func TestGolden(t *testing.T) {
	for _, name := range golden {
		entries, err := FromCSV(bytes.NewReader(read(t, name+".csv")), os.DirFS("testdata"))
		if err != nil {
			t.Fatal(err)
		}
		for suffix, keys := range map[string]*Keys{"": nil, "-encrypted": goldenKeys(t)} {
			image := read(t, name+suffix+".bin")
			if !bytes.Equal(build(t, len(image), entries, keys), image) {
				t.Errorf("%s%s is not what Espressif's generator writes", name, suffix)
			}
			back, err := Parse(image, keys)
			if err != nil || !reflect.DeepEqual(back, entries) {
				t.Errorf("%s%s reads back %v (%v), want %v", name, suffix, back, err, entries)
			}
		}
	}
	entries, err := Parse(read(t, "numbers.bin"), nil)
	if err != nil {
		t.Fatal(err)
	}
	want := []Entry{{"before", "", nil}, {"numbers", "u8", uint8(0)}, {"numbers", "u8_max", uint8(255)}, {"numbers", "i8_min", int8(-128)}}
	if !reflect.DeepEqual(entries[:4], want) {
		t.Errorf("numbers are %v", entries[:4])
	}
	i := slices.IndexFunc(entries, func(e Entry) bool { return e.Key == "i64_min" })
	want = []Entry{{"numbers", "i64_min", int64(-1 << 63)}, {"numbers", "i64_max", int64(1<<63 - 1)}, {"numbers", "fifteen_letters", uint16(4711)}, {"behind", "", nil}}
	if !reflect.DeepEqual(entries[i:], want) {
		t.Errorf("numbers end with %v", entries[i:])
	}
}

func TestKeys(t *testing.T) {
	image := read(t, "keys.bin")
	if !bytes.Equal(goldenKeys(t).Image(), image) {
		t.Error("a key partition is written differently")
	}
	same, blankPage := bytes.Repeat([]byte{7}, pageSize), []byte(blank)
	le.PutUint32(same[KeySize:], checksum(same[:KeySize]))
	copy(same[KeySize+4:], blank)
	damaged, tail := bytes.Clone(image), bytes.Clone(image)
	damaged[3] ^= 1
	tail[pageSize-1] = 0
	for name, bad := range map[string][]byte{"short": image[:80], "erased": blankPage, "same halves": same, "damaged": damaged, "tail": tail} {
		if _, err := ParseKeys(bad); !errors.Is(err, ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := NewKeys(image[:32]); err == nil {
		t.Error("took half of the keys")
	}
}

func TestSecretsStayInside(t *testing.T) {
	e := Entry{"identity", "key", "the secret"}
	asJSON, _ := json.Marshal([]Entry{e})
	keys, _ := json.Marshal([]any{testKeys(t)})
	text := fmt.Sprintf("%v %+v %#v %s %d %x", e, &e, []Entry{e}, e, e, e) + string(asJSON) + string(keys)
	text += fmt.Sprintf("%v %+v %#v %x", testKeys(t), *testKeys(t), testKeys(t), struct{ K *Keys }{testKeys(t)}.K)
	if strings.Contains(text, "secret") || strings.Contains(text, "1, 2, 3") || strings.Contains(text, "1 2 3") || strings.Contains(text, "010203") {
		t.Error(text)
	}
	if want := "identity/key (string)"; e.String() != want {
		t.Errorf("prints as %q, want %q", e, want)
	}
	for _, row := range []string{"k,data,u8,4711", "k,data,hex2bin,4711x", "k,data,base64,4711x", "k,data,i8,4711", "k,data,binary,4711€", "k,data,string,\"4711\n#\""} {
		_, err := FromCSV(strings.NewReader("key,type,encoding,value\nn,namespace,,\n"+row+"\n"), nil)
		if err == nil || strings.Contains(err.Error(), "4711") || !strings.Contains(err.Error(), "line 3") {
			t.Errorf("%q: %v", row, err)
		}
	}
}

func TestBuildRefuses(t *testing.T) {
	many := make([]Entry, maxNamespaces+1)
	for i := range many {
		many[i].Namespace = fmt.Sprint("n", i)
	}
	for name, x := range map[string]struct {
		size    int
		entries []Entry
	}{
		"small":         {8192, nil},
		"odd":           {12289, nil},
		"large":         {MaxSize + pageSize, nil},
		"no namespace":  {MinSize, []Entry{{"", "k", uint8(1)}}},
		"no key":        {MinSize, []Entry{{"n", "", uint8(1)}}},
		"no value":      {MinSize, []Entry{{"n", "k", nil}}},
		"long key":      {MinSize, []Entry{{"n", "sixteen_letters_", uint8(1)}}},
		"long name":     {MinSize, []Entry{{"sixteen_letters_", "k", uint8(1)}}},
		"no ASCII":      {MinSize, []Entry{{"n", "ä", uint8(1)}}},
		"control":       {MinSize, []Entry{{"n", "a\nb", uint8(1)}}},
		"type":          {MinSize, []Entry{{"n", "k", 1}}},
		"NUL":           {MinSize, []Entry{{"n", "k", "a\x00b"}}},
		"long string":   {1 << 20, []Entry{{"n", "k", strings.Repeat("x", 4000)}}},
		"long blob":     {1 << 20, []Entry{{"n", "k", make([]byte, 127*4000+1)}}},
		"128 pages":     {1 << 20, []Entry{{"n", "k", make([]byte, 127*4000)}}}, // the first is begun by the namespace
		"twice":         {MinSize, []Entry{{"n", "k", uint8(1)}, {"m", "k", uint8(1)}, {"n", "k", "x"}}},
		"255 namespace": {MinSize * 2, many},
	} {
		if image, err := Build(nil, x.size, x.entries, nil); err == nil || errors.Is(err, ErrFull) || image != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	build(t, MinSize*2, many[1:], nil)
}

func TestBuildInRoom(t *testing.T) {
	entries := []Entry{{"n", "secret", "SECRET"}, {"n", "long", make([]byte, 7872)}}
	want := build(t, MinSize, entries, nil)
	room := make([]byte, 0, 100+MinSize)
	room = append(room, "before"...)
	image, err := Build(room, MinSize, entries, nil)
	if err != nil || &image[0] != &room[0] || string(image) != "before"+string(want) {
		t.Errorf("built elsewhere, or differently: %v", err)
	}
	// One octet more does not fit, and then there is nothing of it.
	entries[1].Value = make([]byte, 7873)
	image, err = Build(room, MinSize, entries, nil)
	if !errors.Is(err, ErrFull) || image != nil || bytes.Contains(room[:cap(room)], []byte("SECRET")) || string(room) != "before" {
		t.Errorf("a full partition: %v", err)
	}
}

// A string of a whole page is one that a device writes and Espressif's generator does not.
func TestStringOfAPage(t *testing.T) {
	for n := 3966; n < 4000; n++ {
		entries := []Entry{{"n", "k", strings.Repeat("x", n)}, {"n", "after", uint8(1)}}
		if _, err := Build(nil, MinSize, entries, nil); n >= 3968 != errors.Is(err, ErrFull) {
			t.Errorf("%d octets: %v", n, err)
		}
		back, err := Parse(build(t, MinSize+pageSize, entries, nil), nil)
		if err != nil || !reflect.DeepEqual(back, entries) {
			t.Errorf("%d octets: %v", n, err)
		}
	}
}

// entryAt is the n-th entry of a page.
func entryAt(image []byte, page, n int) []byte {
	at := page*pageSize + entriesAt + n*entrySize
	return image[at : at+entrySize : at+entrySize]
}

func setState(image []byte, page, n int, state byte) {
	b := &image[page*pageSize+statesAt+n/4]
	*b = *b&^(3<<(n%4*2)) | state<<(n%4*2)
}

// sum makes the checksum of a header entry right again.
func sum(e []byte) { le.PutUint32(e[4:], headerSum(e)) }

// sumPage makes that of a page right again.
func sumPage(image []byte, page int) {
	p := image[page*pageSize : (page+1)*pageSize]
	le.PutUint32(p[28:], pageSum(p))
}

// What a device makes of an image with time.
func TestParseUsed(t *testing.T) {
	entries := []Entry{{"n", "number", uint16(7)}, {"n", "text", "words of some length, beyond one entry"}, {"n", "blob", make([]byte, 5000)}, {"n", "last", "x"}}
	image := build(t, 5*pageSize, entries, nil)
	// Pages are in any place, the free ones too, and their numbers have gaps.
	moved := slices.Concat(image[4*pageSize:], image[pageSize:2*pageSize], image[2*pageSize:4*pageSize], image[:pageSize])
	le.PutUint32(moved[pageSize+4:], 900)
	sumPage(moved, 1)
	if back, err := Parse(moved, nil); err != nil || !reflect.DeepEqual(back, entries) {
		t.Errorf("moved: %v %v", back, err)
	}
	// Values are erased.
	setState(image, 0, 2, entryErased)
	setState(image, 0, 3, entryErased)
	setState(image, 0, 4, entryErased)
	if back, err := Parse(image, nil); err != nil || !reflect.DeepEqual(back, slices.Concat(entries[:1], entries[2:])) {
		t.Errorf("erased: %v %v", back, err)
	}
	// A blob is in its second version.
	for _, at := range [][2]int{{0, 5}, {1, 0}} {
		e := entryAt(image, at[0], at[1])
		if e[1] != typeBlobData {
			t.Fatalf("entry %v is of type %x", at, e[1])
		}
		e[3] |= 0x80
		sum(e)
	}
	index := entryAt(image, 1, 1+entriesFor(5000-3840))
	index[29] = 0x80
	sum(index)
	if back, err := Parse(image, nil); err != nil || !reflect.DeepEqual(back, slices.Concat(entries[:1], entries[2:])) {
		t.Errorf("second version: %v %v", back, err)
	}
}

func TestParseRefuses(t *testing.T) {
	entries := []Entry{{"n", "number", uint16(7)}, {"n", "text", "words of some length, beyond one entry"}, {"n", "blob", make([]byte, 5000)}}
	good := build(t, 5*pageSize, entries, nil)
	index := 1 + entriesFor(5000-3840)
	if _, err := Parse(good, nil); err != nil || entryAt(good, 1, index)[1] != typeBlobIndex {
		t.Fatal(err)
	}
	// edit changes a header entry and its checksum.
	edit := func(page, n int, f func(e []byte)) func([]byte) {
		return func(image []byte) {
			f(entryAt(image, page, n))
			sum(entryAt(image, page, n))
		}
	}
	set := func(page, n, octet int, v byte) func([]byte) { return edit(page, n, func(e []byte) { e[octet] = v }) }
	put := func(at int, v byte) func([]byte) { return func(image []byte) { image[at] = v } }
	state := func(page, n int, s byte) func([]byte) { return func(image []byte) { setState(image, page, n, s) } }
	pagePut := func(page, at int, v byte) func([]byte) {
		return func(image []byte) {
			image[page*pageSize+at] = v
			sumPage(image, page)
		}
	}
	for name, f := range map[string]func([]byte){
		"page state":             put(0, 0xF8),
		"page state's rest":      put(1, 0),
		"page checksum":          put(28, 0),
		"version 1":              pagePut(0, 8, 0xFF),
		"page reserved":          pagePut(0, 20, 0),
		"two active":             put(0, pageActive),
		"none active":            put(pageSize, pageFull),
		"active not the latest":  pagePut(0, 4, 9),
		"same sequence":          pagePut(0, 4, 1),
		"all erased":             func(image []byte) { copy(image, strings.Repeat(blank, 5)) },
		"no free page":           func(image []byte) { copy(image[2*pageSize:], usedPages(2, 3)) },
		"free page not blank":    put(4*pageSize+99, 0),
		"entry checksum":         func(image []byte) { entryAt(image, 0, 1)[24] ^= 1 },
		"data checksum":          func(image []byte) { entryAt(image, 0, 3)[0] ^= 1 },
		"data padding":           func(image []byte) { entryAt(image, 0, 4)[31] = 0 },
		"illegal state":          state(0, 1, 1),
		"half erased":            state(0, 3, entryErased),
		"half empty":             state(0, 4, entryEmpty),
		"hole":                   state(0, 1, entryEmpty),
		"written behind the end": state(1, 100, entryWritten),
		"octets behind the end":  func(image []byte) { entryAt(image, 1, 100)[5] = 0 },
		"states of no entries":   state(1, 127, entryErased),
		"span 0":                 set(0, 1, 2, 0),
		"span 2":                 set(0, 1, 2, 2),
		"span too long":          set(0, 2, 2, 126),
		"chunk of a number":      set(0, 1, 3, 0),
		"type":                   set(0, 1, 1, 0x41),
		"number's padding":       set(0, 1, 26, 0),
		"key not ended":          edit(0, 1, func(e []byte) { copy(e[8:24], "sixteen_letters_") }),
		"key with a tail":        set(0, 1, 23, 'x'),
		"no key":                 edit(0, 1, func(e []byte) { clear(e[8:24]) }),
		"key of control":         set(0, 1, 8, 7),
		"namespace 255":          set(0, 1, 0, 255),
		"namespace unknown":      set(0, 1, 0, 2),
		"namespace of type i8":   set(0, 0, 1, typeI8),
		"namespace number 0":     set(0, 0, 24, 0),
		"namespace number 255":   set(0, 0, 24, 255),
		"namespace twice":        edit(0, 1, func(e []byte) { copy(e, entryAt(good, 0, 0)) }),
		"number of it twice": edit(0, 1, func(e []byte) {
			copy(e, entryAt(good, 0, 0))
			e[8] = 'm'
		}),
		"key twice":        edit(1, index, func(e []byte) { copy(e, entryAt(good, 0, 1)) }),
		"string reserved":  set(0, 2, 26, 0),
		"string's length":  set(0, 2, 24, 5),
		"string not ended": func(image []byte) { reseal(image, 0, 2, func(b []byte) { b[len(b)-1] = 'x' }) },
		"string with NUL":  func(image []byte) { reseal(image, 0, 2, func(b []byte) { b[3] = 0 }) },
		"chunk number 127": set(1, 0, 3, 127),
		"chunk any":        set(1, 0, 3, noChunk),
		"chunk missing":    set(1, 0, 3, 2),
		"chunk twice":      set(1, 0, 3, 0),
		"index of 0":       set(1, index, 28, 0),
		"index of 1":       set(1, index, 28, 1),
		"index of 128":     set(1, index, 28, 128),
		"index start":      set(1, index, 29, 1),
		"index version":    set(1, index, 29, 0x80),
		"index reserved":   set(1, index, 30, 0),
		"index size":       set(1, index, 24, 0),
		"index erased":     state(1, index, entryErased),
	} {
		image := bytes.Clone(good)
		f(image)
		if bytes.Equal(image, good) {
			t.Errorf("%s changes nothing", name)
		}
		if _, err := Parse(image, nil); !errors.Is(err, ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	encrypted := build(t, MinSize, entries[:1], testKeys(t))
	other, err := NewKeys(append(make([]byte, 63), 1))
	if err != nil {
		t.Fatal(err)
	}
	for name, f := range map[string]func() ([]Entry, error){
		"no keys":    func() ([]Entry, error) { return Parse(encrypted, nil) },
		"other keys": func() ([]Entry, error) { return Parse(encrypted, other) },
		"plain":      func() ([]Entry, error) { return Parse(good, testKeys(t)) },
		"short":      func() ([]Entry, error) { return Parse(good[:8192], nil) },
		"odd":        func() ([]Entry, error) { return Parse(good[:4*pageSize+1], nil) },
	} {
		if _, err := f(); !errors.Is(err, ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	// Every bit of what is in use counts.
	small := build(t, MinSize, entries[:2], nil)
	for i := range 8 * pageSize {
		small[i/8] ^= 1 << (i % 8)
		if back, err := Parse(small, nil); err == nil {
			// A cleared bit may erase an entry, and one more may close the page, for which another would be active.
			if at := i / 8; at < statesAt || at >= entriesAt || len(back) >= 2 {
				t.Errorf("bit %d of octet %d changes nothing", i%8, at)
			}
		}
		small[i/8] ^= 1 << (i % 8)
	}
}

// usedPages are full pages without entries, of those sequence numbers and one more.
func usedPages(from, n int) []byte {
	p := bytes.Repeat([]byte(blank), n)
	for i := range n {
		p[i*pageSize], p[i*pageSize+8] = pageFull, version2
		le.PutUint32(p[i*pageSize+4:], uint32(from+i+100))
		sumPage(p, i)
	}
	p[(n-1)*pageSize] = pageActive
	return p
}

// reseal changes the octets of a string and makes its checksums right.
func reseal(image []byte, page, n int, f func([]byte)) {
	e := entryAt(image, page, n)
	at := page*pageSize + entriesAt + (n+1)*entrySize
	octets := image[at : at+int(le.Uint16(e[24:]))]
	f(octets)
	le.PutUint32(e[28:], checksum(octets))
	sum(e)
}

func TestFromCSVRefuses(t *testing.T) {
	files := fstest.MapFS{"text": {Data: []byte("x\x00")}, "latin1": {Data: []byte("\xE4")}, "dir/f": {}, "huge": {Data: make([]byte, MaxSize/2+1)}}
	const head = "key,type,encoding,value\n"
	const begin = head + "n,namespace,,\n"
	for name, text := range map[string]string{
		"nothing":              "",
		"comments":             "# a\n# b\n",
		"other header":         "key,type,value,encoding\n",
		"BOM":                  "\uFEFF" + begin,
		"not UTF-8":            begin + "k,data,string,\xFF\n",
		"NUL":                  begin + "k,data,string,\x00\n",
		"lone CR":              begin + "k,data,string,a\rk2,data,string,b\n",
		"three fields":         begin + "k,data,u8\n",
		"five fields":          begin + "k,data,u8,1,\n",
		"quote within":         begin + "k,data,string,a\"b\n",
		"quote open":           begin + "k,data,string,\"a\n",
		"comment in a value":   begin + "k,data,string,\"a\n#b\"\n",
		"no namespace":         head + "k,data,u8,1\n",
		"namespace twice":      begin + "m,namespace,,\nn,namespace,,\n",
		"namespace's value":    head + "n,namespace,,1\n",
		"namespace's encoding": head + "n,namespace,u8,\n",
		"namespace's name":     head + "sixteen_letters_,namespace,,\n",
		"type":                 begin + "k,Data,u8,1\n",
		"encoding":             begin + "k,data,U8,1\n",
		"fill":                 begin + "k,data,blob_fill(4;0xFF),1\n",
		"no key":               begin + ",data,u8,1\n",
		"too much":             begin + "k,data,u8,256\n",
		"too little":           begin + "k,data,i8,-129\n",
		"negative":             begin + "k,data,u8,-1\n",
		"hexadecimal":          begin + "k,data,u8,0x10\n",
		"odd digits":           begin + "k,data,hex2bin,123\n",
		"base64 unpadded":      begin + "k,data,base64,AAE\n",
		"base64 with bits":     begin + "k,data,base64,AAF=\n",
		"binary of characters": begin + "k,data,binary,ä\n",
		"long string":          begin + "k,data,string," + strings.Repeat("x", 4000) + "\n",
		"file missing":         begin + "k,file,string,nothing\n",
		"file outside":         begin + "k,file,string,../text\n",
		"file absolute":        begin + "k,file,string,/text\n",
		"file a directory":     begin + "k,file,string,dir\n",
		"file not UTF-8":       begin + "k,file,string,latin1\n",
		"file with NUL":        begin + "k,file,string,text\n",
		"file for Wi-Fi":       begin + "sta.ssid,file,string,dir/f\n",
		"files too large":      begin + "k,file,hex2bin,huge\n",
		"two access points":    begin + "ap.ssid,data,string,s\nap.passwd,data,string,p\nap.authmode,data,u8,3\nap.authmode,data,u8,3\n",
		"too large":            begin + strings.Repeat("#", MaxSize),
	} {
		if entries, err := FromCSV(strings.NewReader(text), files); err == nil || entries != nil {
			t.Errorf("%s: %v", name, entries)
		}
	}
	if _, err := FromCSV(strings.NewReader(begin+"k,file,string,dir/f\n"), nil); err == nil {
		t.Error("read a file of no file system")
	}
	if e, err := FromCSV(strings.NewReader(begin+"k,file,string,./dir//f\n"), files); err != nil || e[0].Value != "" {
		t.Errorf("an empty file: %v", err)
	}
}

func FuzzParse(f *testing.F) {
	keys := goldenKeys(f)
	for _, name := range []string{"numbers", "blobs", "wifi"} {
		f.Add(pack(read(f, name+".bin")), false)
		f.Add(pack(read(f, name+"-encrypted.bin")), true)
	}
	// A blob over two pages, neither of them filled.
	w := writer{size: MinSize}
	_ = w.turn()
	_ = w.number(0, typeU8, "n", 1)
	w.value(1, typeBlobData, 0, "k", copy(w.room(), "first"))
	_ = w.turn()
	w.value(1, typeBlobData, 1, "k", copy(w.room(), "second"))
	w.item(1, typeBlobIndex, 1, noChunk, "k", 11|2<<32|0xFFFF<<48)
	_ = w.text(1, "t", "text")
	f.Add(pack(append(w.image, blank...)), false)
	f.Fuzz(func(t *testing.T, packed []byte, encrypted bool) {
		image, k := unpack(packed), keys
		if !encrypted {
			k = nil
			repair(image)
		}
		before := bytes.Clone(image)
		entries, err := Parse(image, k)
		if !bytes.Equal(image, before) {
			t.Fatal("the image changed")
		}
		if err != nil {
			if !errors.Is(err, ErrInvalid) || entries != nil {
				t.Fatal(err)
			}
			return
		}
		again, err := Build(nil, 2*len(image), entries, k) // nothing erased in it, but pages may be less full
		if err != nil {
			t.Fatal(err)
		}
		if back, err := Parse(again, k); err != nil || !reflect.DeepEqual(back, entries) {
			t.Fatalf("%v reads back as %v (%v)", entries, back, err)
		}
	})
}

// pack makes an image short, for the fuzzer: each page is how many of its 32-octet pieces are in use, and those.
func pack(image []byte) (packed []byte) {
	for p := range slices.Chunk(image, pageSize) {
		n := entriesFor(len(bytes.TrimRight(p, "\xFF")))
		packed = append(append(packed, byte(n)), p[:n*entrySize]...)
	}
	return packed
}

// unpack takes anything, and makes three pages or more of it, at most eight, the last of them free.
func unpack(packed []byte) (image []byte) {
	for len(packed) > 0 && len(image) < 7*pageSize {
		n := min(int(packed[0])%129*entrySize, len(packed)-1)
		image = append(append(image, packed[1:1+n]...), blank[n:]...)
		packed = packed[1+n:]
	}
	return append(image, strings.Repeat(blank, max(1, 3-len(image)/pageSize))...)
}

// repair makes the checksums of an image right, for the fuzzer to get past them.
func repair(image []byte) {
	for page := range len(image) / pageSize {
		sumPage(image, page)
		if isBlank(image[page*pageSize+4:page*pageSize+28]) && image[page*pageSize] == 0xFF {
			copy(image[page*pageSize+28:page*pageSize+32], blank)
		}
		for n := 0; n < pageEntries; n++ {
			if image[page*pageSize+statesAt+n/4]>>(n%4*2)&3 != entryWritten {
				continue
			}
			e := entryAt(image, page, n)
			if span := int(e[2]); (e[1] == typeString || e[1] == typeBlobData) && span > 0 && n+span <= pageEntries {
				if size := int(le.Uint16(e[24:])); size <= (span-1)*entrySize {
					reseal(image, page, n, func([]byte) {})
					n += span - 1
				}
			}
			sum(e)
		}
	}
}

func FuzzFromCSV(f *testing.F) {
	for _, name := range golden {
		f.Add(read(f, name+".csv"), []byte("00ff"))
	}
	f.Add([]byte("key,type,encoding,value\r\nn,namespace,,\r\nk,file,hex2bin,f\r\n"), []byte("00ff"))
	f.Fuzz(func(t *testing.T, text, file []byte) {
		entries, err := FromCSV(bytes.NewReader(text), fstest.MapFS{"f": {Data: file}, "files/text.pem": {Data: file}, "files/long.bin": {Data: file}})
		if err != nil {
			return
		}
		seen := map[[2]string]bool{}
		for _, e := range entries {
			seen[[2]string{e.Namespace, e.Key}] = true
		}
		image, err := Build(nil, 1<<20, entries, nil)
		if err != nil {
			if len(seen) == len(entries) && !errors.Is(err, ErrFull) && len(text)+len(file) < 1000 {
				t.Fatalf("%v from %q", err, text)
			}
			return
		}
		if back, err := Parse(image, nil); err != nil || !reflect.DeepEqual(back, entries) {
			t.Fatalf("%v reads back as %v (%v)", entries, back, err)
		}
	})
}

func BenchmarkBuild(b *testing.B) {
	entries := []Entry{{"identity", "certificate", make([]byte, 900)}, {"identity", "key", make([]byte, 240)}, {"identity", "serial", "SN00000001"},
		{"identity", "scope", "0ne00112233"}, {"identity", "endpoint", "global.azure-devices-provisioning.net"}, {"identity", "version", uint32(1)}}
	for name, keys := range map[string]*Keys{"plain": nil, "encrypted": testKeys(b)} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			var image []byte
			for b.Loop() {
				var err error
				if image, err = Build(image[:0], MinSize, entries, keys); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
