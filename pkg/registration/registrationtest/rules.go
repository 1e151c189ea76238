package registrationtest

import (
	"go/ast"
	"go/parser"
	"go/token"
	"go/types"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// Rules reads the source of package registration, in dir, and returns the names of all rules that it refuses devices by. It fails the
// test where a device is refused by no rule: such a refusal can be explained to nobody.
func Rules(t *testing.T, dir string) (rules []string) {
	t.Helper()
	fset := token.NewFileSet()
	sources := func(dir string) (all []*ast.File) {
		paths, err := filepath.Glob(filepath.Join(dir, "*.go"))
		if err != nil || len(paths) == 0 {
			t.Fatalf("no source in %s: %v", dir, err)
		}
		for _, p := range paths {
			if strings.HasSuffix(p, "_test.go") {
				continue
			}
			f, err := parser.ParseFile(fset, p, nil, parser.SkipObjectResolution)
			if err != nil {
				t.Fatal(err)
			}
			all = append(all, f)
		}
		return all
	}
	named := make(map[string]bool) // errors that stand for a rule
	var refusals []*ast.CallExpr
	add := func(e ast.Expr) {
		lit, ok := e.(*ast.BasicLit)
		if !ok {
			t.Errorf("%s: the rule's name is not written out", fset.Position(e.Pos()))
			return
		}
		if rule, _ := strconv.Unquote(lit.Value); !slices.Contains(rules, rule) {
			rules = append(rules, rule)
		}
	}
	for _, f := range sources(dir) {
		for _, d := range f.Decls {
			fn, ok := d.(*ast.FuncDecl)
			if !ok || fn.Name.Name == "because" || fn.Name.Name == "openGrant" { // which has a refuse of its own, of bundles
				continue
			}
			ast.Inspect(fn, func(n ast.Node) bool {
				switch n := n.(type) {
				case *ast.CallExpr:
					switch name, _ := n.Fun.(*ast.Ident); {
					case name == nil:
					case name.Name == "because":
						add(n.Args[0])
					case name.Name == "refuse":
						refusals = append(refusals, n)
					}
				case *ast.CompositeLit:
					if name, ok := n.Type.(*ast.Ident); ok && name.Name == "broken" {
						add(n.Elts[0])
					}
					if fn.Name.Name == "ruleOf" && n.Type == nil && len(n.Elts) == 2 {
						named[types.ExprString(n.Elts[0])] = true
						add(n.Elts[1])
					}
				}
				return true
			})
		}
	}
	for _, c := range refusals {
		switch arg := c.Args[0].(type) {
		case *ast.Ident, *ast.UnaryExpr: // one that another package made, or a broken
		case *ast.SelectorExpr:
			if !named[types.ExprString(arg)] {
				t.Errorf("%s: %s has no rule in ruleOf", fset.Position(c.Pos()), types.ExprString(arg))
			}
		default:
			t.Errorf("%s: refused by no rule: use because", fset.Position(c.Pos()))
		}
	}
	for _, f := range sources(filepath.Join(dir, "..", "attest")) {
		ast.Inspect(f, func(n ast.Node) bool {
			if v, ok := n.(*ast.ValueSpec); ok {
				for _, name := range v.Names {
					if strings.HasPrefix(name.Name, "Err") && name.Name != "ErrAmbiguous" && !named["attest."+name.Name] { // which comes as an ErrChain
						t.Errorf("%s: attest.%s has no rule in ruleOf", fset.Position(name.Pos()), name.Name)
					}
				}
			}
			return true
		})
	}
	if len(rules) < 20 {
		t.Errorf("no more than these rules were found: %q", rules)
	}
	return rules
}
