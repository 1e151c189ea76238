/*
 * The identity of one device, for firmware that has it compiled in. It holds the device's key where that is a file or symmetric:
 * one image for each device, and secret = true in the profile. Chains of more than 4095 characters are longer than ISO C99 asks
 * compilers to take; all usual ones do.
 */
#ifndef TOUCHMARK_DEVICE_H
#define TOUCHMARK_DEVICE_H

#define TOUCHMARK_ID_SCOPE {{ c .IDScope }}
#define TOUCHMARK_GLOBAL_ENDPOINT {{ c .GlobalEndpoint }}
#define TOUCHMARK_REGISTRATION_ID {{ c .RegistrationID }}
#define TOUCHMARK_SERIAL {{ c .Serial }}
#define TOUCHMARK_ATTESTATION {{ c .Attestation }}
{{- if eq .Attestation "x509" }}

/* PEM, the device's certificate first */
#define TOUCHMARK_CERTIFICATE_CHAIN {{ c .CertificateChain }}
{{- if .KeyURI }}
#define TOUCHMARK_KEY_URI {{ c .KeyURI }}
{{- else }}

/* PKCS #8, PEM */
#define TOUCHMARK_PRIVATE_KEY {{ c .PrivateKey }}
{{- end }}
{{- else if .SymmetricKey }}

/* base64 */
#define TOUCHMARK_SYMMETRIC_KEY {{ c .SymmetricKey }}
{{- end }}

#endif
