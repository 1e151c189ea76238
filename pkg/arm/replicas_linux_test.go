package arm_test

import (
	"testing"

	"github.com/touchmark/touchmark/pkg/registration/registrationtest"
	"github.com/touchmark/touchmark/pkg/sqlstore/sqlstoretest"
)

// The management API at three replicas on one database, where each request goes to another replica than the last.
func TestReplicas(t *testing.T) {
	t.Parallel()
	database := sqlstoretest.Start(t).Database
	databases.Store(&database)
	registrationtest.Again(t, map[string]string{"TestErasure": "looks into the file of a store"},
		TestLife, TestPolicies, TestHostile, TestPrivateEndpoints, TestPages, TestAuthorization, TestCertificates,
		TestCertificateQuota, TestOpenSSL, TestLongDeletion, TestDeletionResumes, TestDeletionGoesOn, TestFirst, TestEraseFirst, TestMaskedKeys, TestHubCheck)
}
