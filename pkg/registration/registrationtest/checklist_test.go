package registrationtest_test

import (
	"go/ast"
	"go/parser"
	"go/token"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

var (
	rowForm = regexp.MustCompile(`^\| (\d+) \| ([^|]+) \| ([^|]+) \|$`)
	refForm = regexp.MustCompile("`([^`:]+)::(\\w+)(?:/([^`]+))?`")
	// citeForm is how a test names its items: "DPS-D 9, 14" or "DPS-D 1 to 5, and 8"; of the service API, "DPS-S 7".
	citeForm = regexp.MustCompile(`DPS-([DS]) (\d+(?: to \d+)?(?:(?:,| and|, and) \d+(?: to \d+)?)*)`)
	spanForm = regexp.MustCompile(`(\d+)(?: to (\d+))?`)
	wrapForm = regexp.MustCompile(`\s*\n\s*//\s*`)
)

// A checklist is one of the two tables.
type checklist struct {
	file, letter string // of its items
	items        int
}

var (
	ofDevices  = checklist{"checklist.md", "D", 102}         // device API, section 18
	ofServices = checklist{"service-checklist.md", "S", 102} // service API, section 9
)

// cited reads the items of a letter that a file names.
func cited(text, letter string) map[int]bool {
	all := make(map[int]bool)
	for _, c := range citeForm.FindAllStringSubmatch(wrapForm.ReplaceAllString(text, " "), -1) {
		if c[1] != letter {
			continue
		}
		for _, s := range spanForm.FindAllStringSubmatch(c[2], -1) {
			from, _ := strconv.Atoi(s[1])
			to, err := strconv.Atoi(s[2])
			if err != nil {
				to = from
			}
			for n := from; n <= to; n++ {
				all[n] = true
			}
		}
	}
	return all
}

func TestCited(t *testing.T) {
	for text, want := range map[string][]int{
		"DPS-D 9, 14.": {9, 14}, "DPS-D 1 to 4, and 8": {1, 2, 3, 4, 8}, "x: DPS-D\n\t// 41, 42,\n// 45": {41, 42, 45}, "DPS-D 2; 3, DPS-S 7": {2}, "DPS-D 5 and 7 of 9": {5, 7},
		"device API, section 8": nil,
	} {
		if got := slices.Sorted(maps.Keys(cited(text, "D"))); !slices.Equal(got, want) {
			t.Errorf("%q cites %v", text, got)
		}
	}
}

// source is a Go file of this repository: its functions, their subtests, and the items that it names.
type source struct {
	functions map[string][]string
	suites    map[string]bool // functions that run Doors
	text      string
}

func load(t *testing.T, path string) *source {
	t.Helper()
	file := filepath.Join("..", "..", "..", filepath.FromSlash(path))
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	tree, err := parser.ParseFile(token.NewFileSet(), path, b, parser.SkipObjectResolution)
	if err != nil {
		t.Fatal(err)
	}
	s := &source{make(map[string][]string), make(map[string]bool), string(b)}
	for _, d := range tree.Decls {
		f, ok := d.(*ast.FuncDecl)
		if !ok {
			continue
		}
		subtests := []string{}
		ast.Inspect(f, func(n ast.Node) bool {
			call, ok := n.(*ast.CallExpr)
			if !ok {
				return true
			}
			called, ok := call.Fun.(*ast.SelectorExpr)
			if !ok || len(call.Args) == 0 {
				return true
			}
			if name, ok := call.Args[0].(*ast.BasicLit); ok && called.Sel.Name == "Run" {
				text, _ := strconv.Unquote(name.Value)
				subtests = append(subtests, text)
			}
			s.suites[f.Name.Name] = s.suites[f.Name.Name] || called.Sel.Name == "Doors"
			return true
		})
		s.functions[f.Name.Name] = subtests
	}
	return s
}

// Every item of a checklist has one row; what a row names is there, and its file names the item.
func TestChecklist(t *testing.T) {
	b := ofDevices.check(t)
	// What the table says of the suite: it runs on every transport.
	for _, at := range []string{"pkg/httpd/httpd_test.go::TestDoor", "pkg/mqttd/mqttd_test.go::TestDoor", "pkg/mqttd/socket_test.go::TestSocketDoor", "pkg/amqpd/amqpd_test.go::TestDoor", "pkg/amqpd/socket_test.go::TestSocketDoor",
		"pkg/httpd/replicas_linux_test.go::TestReplicas", "pkg/mqttd/replicas_linux_test.go::TestReplicas", "pkg/amqpd/replicas_linux_test.go::TestReplicas"} {
		path, name, _ := strings.Cut(at, "::")
		if !load(t, path).suites[name] || !strings.Contains(string(b), "`"+at+"`") {
			t.Errorf("%s does not run the suite, or is not named", at)
		}
	}
}

func TestServiceChecklist(t *testing.T) { ofServices.check(t) }

func (l checklist) check(t *testing.T) []byte {
	t.Helper()
	b, err := os.ReadFile(l.file)
	if err != nil {
		t.Fatal(err)
	}
	files := make(map[string]*source)
	next := 1
	for line := range strings.Lines(string(b)) {
		line = strings.TrimSuffix(line, "\n")
		if !strings.HasPrefix(line, "|") || strings.HasPrefix(line, "| # |") || strings.HasPrefix(line, "| ---") {
			continue
		}
		row := rowForm.FindStringSubmatch(line)
		if row == nil {
			t.Fatalf("no row: %s", line)
		}
		n, _ := strconv.Atoi(row[1])
		if n != next {
			t.Fatalf("item %d where %d belongs", n, next)
		}
		next++
		refs := refForm.FindAllStringSubmatch(row[3], -1)
		reason, argued := strings.CutPrefix(row[3], "argued: ")
		if rest := strings.Trim(refForm.ReplaceAllString(row[3], ""), ", "); !argued && (len(refs) == 0 || rest != "") || argued && len(reason) < 40 {
			t.Errorf("item %d has no test and no argument, or more than tests: %q", n, rest)
		}
		for _, r := range refs {
			if files[r[1]] == nil {
				files[r[1]] = load(t, r[1])
			}
			subtests, ok := files[r[1]].functions[r[2]]
			if !ok || r[3] != "" && !slices.Contains(subtests, r[3]) {
				t.Errorf("item %d: no %s", n, r[0])
			}
			if !argued && !cited(files[r[1]].text, l.letter)[n] {
				t.Errorf("item %d: %s does not name it", n, r[1])
			}
		}
	}
	if next != l.items+1 {
		t.Errorf("%d rows of %d", next-1, l.items)
	}
	return b
}
