package serviceapi_test

import (
	"testing"

	"github.com/touchmark/touchmark/pkg/registration/registrationtest"
	"github.com/touchmark/touchmark/pkg/sqlstore/sqlstoretest"
)

// The service API at three replicas on one database, where each request goes to another replica than the last.
func TestReplicas(t *testing.T) {
	t.Parallel()
	fresh := registrationtest.Replicas(sqlstoretest.Start(t))
	replicas.Store(&fresh)
	registrationtest.Again(t, nil,
		TestCalls, TestServiceTransport, TestServiceWrites, TestServiceKeys, TestServiceCertificates, TestServiceQueries,
		TestServiceAuthorization, TestServiceTokenForms, TestOrders, TestAuthorizationMatrix, TestIsolationMatrix, TestAddresses,
		TestProvisioning, TestOneWinner, TestWriters, TestPolicyRaces, TestForms, TestMembers, TestKeysAndTags, TestValidation,
		TestReferences, TestForgotten, TestEndorsementKeys, TestRolls, TestRollOfLongAgo, TestBulk, TestContinuations, TestStrictQuery, TestAudit, TestPolicies)
}
