package serviceapi_test

import (
	"os"
	"path/filepath"
	"regexp"
	"testing"

	"github.com/touchmark/touchmark/pkg/registration/registrationtest"
	"github.com/touchmark/touchmark/pkg/sqlstore/sqlstoretest"
)

// sprayed are the tests of a service that run at three replicas on one database too, where each request goes to another replica than
// the last.
var sprayed = map[string]func(*testing.T){
	"TestCalls": TestCalls, "TestServiceTransport": TestServiceTransport, "TestServiceWrites": TestServiceWrites, "TestServiceKeys": TestServiceKeys, "TestServiceCertificates": TestServiceCertificates,
	"TestServiceQueries": TestServiceQueries, "TestServiceAuthorization": TestServiceAuthorization, "TestServiceTokenForms": TestServiceTokenForms, "TestOrders": TestOrders,
	"TestAuthorizationMatrix": TestAuthorizationMatrix, "TestIsolationMatrix": TestIsolationMatrix, "TestAddresses": TestAddresses, "TestProvisioning": TestProvisioning,
	"TestOneWinner": TestOneWinner, "TestWriters": TestWriters, "TestPolicyRaces": TestPolicyRaces, "TestForms": TestForms, "TestMembers": TestMembers, "TestKeysAndTags": TestKeysAndTags,
	"TestValidation": TestValidation, "TestReferences": TestReferences, "TestForgotten": TestForgotten, "TestEndorsementKeys": TestEndorsementKeys, "TestBulk": TestBulk, "TestContinuations": TestContinuations,
	"TestStrictQuery": TestStrictQuery, "TestAudit": TestAudit, "TestPolicies": TestPolicies,
}

// alone are those that do not, and why.
var alone = map[string]string{
	"TestReplicas": "runs the others",
}

var testForm = regexp.MustCompile(`(?m)^func (Test\w+)\(t `)

func TestReplicas(t *testing.T) {
	t.Parallel()
	fresh := registrationtest.Replicas(sqlstoretest.Start(t))
	replicas.Store(&fresh)
	for name, test := range sprayed {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			test(t)
		})
	}
	files, err := filepath.Glob("*_test.go")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range testForm.FindAllSubmatch(text, -1) {
			if name := string(f[1]); sprayed[name] == nil && alone[name] == "" {
				t.Errorf("%s runs on a file alone, and nobody says why", name)
			}
		}
	}
}
