//! Numbers from IANA's "IKEv2 Parameters" registry, as newtypes with named constants. Values that have
//! no name here are legal values too: they print as numbers and are carried through.

use core::fmt;

macro_rules! registry {
    ($(#[$doc:meta])* $name:ident($repr:ty) { $($(#[$vdoc:meta])* $value:ident = $number:literal,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub $repr);

        impl $name {
            $($(#[$vdoc])* pub const $value: $name = $name($number);)*

            /// The registered name, if it is one listed here.
            #[must_use]
            pub fn name(self) -> Option<&'static str> {
                match self.0 {
                    $($number => Some(stringify!($value)),)*
                    _ => None,
                }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                match self.name() {
                    Some(name) => f.pad(name),
                    None => write!(f, "{}({})", stringify!($name), self.0),
                }
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }
    };
}

registry! {
    /// Kind of exchange (RFC 7296 §3.1).
    ExchangeType(u8) {
        /// First exchange: algorithms, nonces, Diffie-Hellman.
        IKE_SA_INIT = 34,
        /// Identities and the first Child SA.
        IKE_AUTH = 35,
        /// Further Child SAs and all rekeying.
        CREATE_CHILD_SA = 36,
        /// Deletes, errors, liveness.
        INFORMATIONAL = 37,
        /// RFC 5723.
        IKE_SESSION_RESUME = 38,
        /// RFC 9242.
        IKE_INTERMEDIATE = 43,
    }
}

registry! {
    /// Kind of payload (RFC 7296 §3.2).
    PayloadType(u8) {
        /// End of the chain.
        NONE = 0,
        /// Security association: proposals.
        SA = 33,
        /// Key exchange.
        KE = 34,
        /// Identity of the initiator.
        IDI = 35,
        /// Identity of the responder.
        IDR = 36,
        /// Certificate.
        CERT = 37,
        /// Certificate request.
        CERTREQ = 38,
        /// Authentication.
        AUTH = 39,
        /// Nonce.
        NONCE = 40,
        /// Notify.
        NOTIFY = 41,
        /// Delete.
        DELETE = 42,
        /// Vendor id.
        VENDOR_ID = 43,
        /// Traffic selectors of the initiator's side.
        TSI = 44,
        /// Traffic selectors of the responder's side.
        TSR = 45,
        /// Encrypted and authenticated.
        SK = 46,
        /// Configuration.
        CP = 47,
        /// Extensible authentication.
        EAP = 48,
        /// Encrypted and authenticated fragment (RFC 7383).
        SKF = 53,
    }
}

registry! {
    /// What an SPI belongs to (RFC 7296 §3.3.1).
    ProtocolId(u8) {
        /// No SA in particular; in Notify only (RFC 7296 §3.10).
        NONE = 0,
        /// IKE.
        IKE = 1,
        /// Authentication header.
        AH = 2,
        /// Encapsulating security payload.
        ESP = 3,
    }
}

registry! {
    /// What a transform chooses (RFC 7296 §3.3.2).
    TransformType(u8) {
        /// Encryption algorithm.
        ENCR = 1,
        /// Pseudorandom function.
        PRF = 2,
        /// Integrity algorithm.
        INTEG = 3,
        /// Key exchange method (Diffie-Hellman group).
        KE = 4,
        /// Extended sequence numbers.
        ESN = 5,
    }
}

registry! {
    /// Encryption algorithms: transform type 1.
    EncrId(u16) {
        /// Triple DES.
        TRIPLE_DES = 3,
        /// Null encryption.
        NULL = 11,
        /// AES-CBC.
        AES_CBC = 12,
        /// AES-CTR.
        AES_CTR = 13,
        /// AES-GCM with an 8-byte ICV.
        AES_GCM_8 = 18,
        /// AES-GCM with a 12-byte ICV.
        AES_GCM_12 = 19,
        /// AES-GCM with a 16-byte ICV (RFC 4106, RFC 5282).
        AES_GCM_16 = 20,
        /// ChaCha20-Poly1305 (RFC 7634). Carries no key-length attribute.
        CHACHA20_POLY1305 = 28,
        /// AES-GCM with the IV implied by the sequence number (RFC 8750); we refuse it.
        AES_GCM_16_IIV = 30,
        /// ChaCha20-Poly1305 with an implied IV (RFC 8750); we refuse it.
        CHACHA20_POLY1305_IIV = 31,
    }
}

registry! {
    /// Pseudorandom functions: transform type 2.
    PrfId(u16) {
        /// HMAC-MD5.
        HMAC_MD5 = 1,
        /// HMAC-SHA-1.
        HMAC_SHA1 = 2,
        /// AES-XCBC.
        AES128_XCBC = 4,
        /// HMAC-SHA-256 (RFC 4868).
        HMAC_SHA2_256 = 5,
        /// HMAC-SHA-384 (RFC 4868).
        HMAC_SHA2_384 = 6,
        /// HMAC-SHA-512 (RFC 4868).
        HMAC_SHA2_512 = 7,
    }
}

registry! {
    /// Integrity algorithms: transform type 3.
    IntegId(u16) {
        /// None; what AEADs may name here (RFC 7296 §3.3).
        NONE = 0,
        /// HMAC-SHA-1-96.
        HMAC_SHA1_96 = 2,
        /// HMAC-SHA-256-128 (RFC 4868).
        HMAC_SHA2_256_128 = 12,
        /// HMAC-SHA-384-192 (RFC 4868).
        HMAC_SHA2_384_192 = 13,
        /// HMAC-SHA-512-256 (RFC 4868).
        HMAC_SHA2_512_256 = 14,
    }
}

registry! {
    /// Key exchange methods: transform type 4 and the group field of the KE payload.
    GroupId(u16) {
        /// No key exchange.
        NONE = 0,
        /// 2048-bit MODP.
        MODP_2048 = 14,
        /// 3072-bit MODP.
        MODP_3072 = 15,
        /// 4096-bit MODP.
        MODP_4096 = 16,
        /// NIST P-256 (RFC 5903).
        P256 = 19,
        /// NIST P-384 (RFC 5903).
        P384 = 20,
        /// NIST P-521 (RFC 5903).
        P521 = 21,
        /// X25519 (RFC 8031).
        X25519 = 31,
        /// X448 (RFC 8031).
        X448 = 32,
    }
}

registry! {
    /// Extended sequence numbers: transform type 5.
    EsnId(u16) {
        /// 32-bit sequence numbers.
        OFF = 0,
        /// 64-bit sequence numbers.
        ON = 1,
    }
}

registry! {
    /// Kind of identity (RFC 7296 §3.5).
    IdType(u8) {
        /// Four bytes of IPv4 address.
        IPV4_ADDR = 1,
        /// Fully qualified domain name.
        FQDN = 2,
        /// Mail address.
        RFC822_ADDR = 3,
        /// Sixteen bytes of IPv6 address.
        IPV6_ADDR = 5,
        /// Distinguished name, DER.
        DER_ASN1_DN = 9,
        /// General name, DER.
        DER_ASN1_GN = 10,
        /// Opaque bytes.
        KEY_ID = 11,
    }
}

registry! {
    /// How the AUTH payload was computed (RFC 7296 §3.8).
    AuthMethod(u8) {
        /// RSA PKCS#1 v1.5.
        RSA = 1,
        /// Shared key.
        SHARED_KEY = 2,
        /// DSS with SHA-1.
        DSS = 3,
        /// ECDSA P-256 with SHA-256 (RFC 4754).
        ECDSA_256 = 9,
        /// ECDSA P-384 with SHA-384 (RFC 4754).
        ECDSA_384 = 10,
        /// ECDSA P-521 with SHA-512 (RFC 4754).
        ECDSA_521 = 11,
        /// Null authentication (RFC 7619).
        NULL = 13,
        /// Digital signature with its algorithm named (RFC 7427).
        DIGITAL_SIGNATURE = 14,
    }
}

registry! {
    /// Kind of Notify (RFC 7296 §3.10.1 and the RFCs named). Below 16384 errors, above status.
    NotifyType(u16) {
        /// RFC 7296 §2.5. Data: the payload type, one byte.
        UNSUPPORTED_CRITICAL_PAYLOAD = 1,
        /// RFC 7296 §2.21.4.
        INVALID_IKE_SPI = 4,
        /// RFC 7296 §2.5.
        INVALID_MAJOR_VERSION = 5,
        /// RFC 7296 §2.21.
        INVALID_SYNTAX = 7,
        /// RFC 7296 §2.3. Data: the message id, four bytes.
        INVALID_MESSAGE_ID = 9,
        /// RFC 7296 §1.5. Data: the SPI.
        INVALID_SPI = 11,
        /// RFC 7296 §2.7.
        NO_PROPOSAL_CHOSEN = 14,
        /// RFC 7296 §1.3. Data: the accepted group, two bytes.
        INVALID_KE_PAYLOAD = 17,
        /// RFC 7296 §2.21.2.
        AUTHENTICATION_FAILED = 24,
        /// RFC 7296 §2.9.
        SINGLE_PAIR_REQUIRED = 34,
        /// RFC 7296 §1.3.
        NO_ADDITIONAL_SAS = 35,
        /// RFC 7296 §3.15.4.
        INTERNAL_ADDRESS_FAILURE = 36,
        /// RFC 7296 §2.19.
        FAILED_CP_REQUIRED = 37,
        /// RFC 7296 §2.9.
        TS_UNACCEPTABLE = 38,
        /// RFC 7296 §3.10.1. Data: start of the offending packet.
        INVALID_SELECTORS = 39,
        /// RFC 4555 §3.
        UNACCEPTABLE_ADDRESSES = 40,
        /// RFC 4555 §3.9.
        UNEXPECTED_NAT_DETECTED = 41,
        /// RFC 7296 §2.25.
        TEMPORARY_FAILURE = 43,
        /// RFC 7296 §2.25.
        CHILD_SA_NOT_FOUND = 44,

        /// RFC 7296 §2.4.
        INITIAL_CONTACT = 16384,
        /// RFC 7296 §2.3. Data: the window, four bytes.
        SET_WINDOW_SIZE = 16385,
        /// RFC 7296 §2.9.
        ADDITIONAL_TS_POSSIBLE = 16386,
        /// RFC 7296 §2.22.
        IPCOMP_SUPPORTED = 16387,
        /// RFC 7296 §2.23. Data: SHA-1 of SPIs, address and port.
        NAT_DETECTION_SOURCE_IP = 16388,
        /// RFC 7296 §2.23.
        NAT_DETECTION_DESTINATION_IP = 16389,
        /// RFC 7296 §2.6. Data: 1 to 64 bytes.
        COOKIE = 16390,
        /// RFC 7296 §1.3.1.
        USE_TRANSPORT_MODE = 16391,
        /// RFC 7296 §3.6.
        HTTP_CERT_LOOKUP_SUPPORTED = 16392,
        /// RFC 7296 §1.3.3. SPI: the Child SA that is replaced.
        REKEY_SA = 16393,
        /// RFC 7296 §1.3.1.
        ESP_TFC_PADDING_NOT_SUPPORTED = 16394,
        /// RFC 7296 §1.3.1.
        NON_FIRST_FRAGMENTS_ALSO = 16395,
        /// RFC 4555 §3.3.
        MOBIKE_SUPPORTED = 16396,
        /// RFC 4555 §3.4.
        ADDITIONAL_IP4_ADDRESS = 16397,
        /// RFC 4555 §3.4.
        ADDITIONAL_IP6_ADDRESS = 16398,
        /// RFC 4555 §3.4.
        NO_ADDITIONAL_ADDRESSES = 16399,
        /// RFC 4555 §3.5.
        UPDATE_SA_ADDRESSES = 16400,
        /// RFC 4555 §3.7.
        COOKIE2 = 16401,
        /// RFC 4555 §3.9.
        NO_NATS_ALLOWED = 16402,
        /// RFC 4478.
        AUTH_LIFETIME = 16403,
        /// RFC 4739.
        MULTIPLE_AUTH_SUPPORTED = 16404,
        /// RFC 4739.
        ANOTHER_AUTH_FOLLOWS = 16405,
        /// RFC 5685 §3.
        REDIRECT_SUPPORTED = 16406,
        /// RFC 5685.
        REDIRECT = 16407,
        /// RFC 5685.
        REDIRECTED_FROM = 16408,
        /// RFC 5723.
        TICKET_LT_OPAQUE = 16409,
        /// RFC 5723.
        TICKET_REQUEST = 16410,
        /// RFC 5723.
        TICKET_ACK = 16411,
        /// RFC 5723.
        TICKET_NACK = 16412,
        /// RFC 5723.
        TICKET_OPAQUE = 16413,
        /// RFC 5998 §4.
        EAP_ONLY_AUTHENTICATION = 16417,
        /// RFC 6023 §3.
        CHILDLESS_IKEV2_SUPPORTED = 16418,
        /// RFC 6290 §4.1.
        QUICK_CRASH_DETECTION = 16419,
        /// RFC 6311 §7.
        IKEV2_MESSAGE_ID_SYNC_SUPPORTED = 16420,
        /// RFC 6311 §7.
        IPSEC_REPLAY_COUNTER_SYNC_SUPPORTED = 16421,
        /// RFC 6311 §7. Data: nonce, M1, P1, four bytes each.
        IKEV2_MESSAGE_ID_SYNC = 16422,
        /// RFC 6311 §7.
        IPSEC_REPLAY_COUNTER_SYNC = 16423,
        /// RFC 7383 §2.3.
        IKEV2_FRAGMENTATION_SUPPORTED = 16430,
        /// RFC 7427 §4. Data: hash algorithm ids, two bytes each.
        SIGNATURE_HASH_ALGORITHMS = 16431,
        /// RFC 8019 §8.1.
        PUZZLE = 16434,
        /// RFC 8784 §3.
        USE_PPK = 16435,
        /// RFC 8784 §3.
        PPK_IDENTITY = 16436,
        /// RFC 8784 §3.
        NO_PPK_AUTH = 16437,
        /// RFC 9242 §3.1.
        INTERMEDIATE_EXCHANGE_SUPPORTED = 16438,
    }
}

impl NotifyType {
    /// Whether the type reports an error; the others are status (RFC 7296 §3.10.1).
    /// An unknown error in a response fails the request; unknown status is ignored.
    #[must_use]
    pub fn is_error(self) -> bool {
        self.0 < 16384
    }
}

registry! {
    /// Kind of Configuration payload (RFC 7296 §3.15).
    CfgType(u8) {
        /// Request.
        REQUEST = 1,
        /// Reply.
        REPLY = 2,
        /// Set.
        SET = 3,
        /// Acknowledgement of a set.
        ACK = 4,
    }
}

registry! {
    /// Kind of configuration attribute (RFC 7296 §3.15.1); 15 bits.
    CfgAttributeType(u16) {
        /// An address, 0 or 4 bytes.
        INTERNAL_IP4_ADDRESS = 1,
        /// A mask, 0 or 4 bytes.
        INTERNAL_IP4_NETMASK = 2,
        /// A name server, 0 or 4 bytes.
        INTERNAL_IP4_DNS = 3,
        /// A NetBIOS server, 0 or 4 bytes.
        INTERNAL_IP4_NBNS = 4,
        /// A DHCP server, 0 or 4 bytes.
        INTERNAL_IP4_DHCP = 6,
        /// Text.
        APPLICATION_VERSION = 7,
        /// An address and prefix length, 0 or 17 bytes.
        INTERNAL_IP6_ADDRESS = 8,
        /// A name server, 0 or 16 bytes.
        INTERNAL_IP6_DNS = 10,
        /// A DHCP server, 0 or 16 bytes.
        INTERNAL_IP6_DHCP = 12,
        /// Address and mask, 0 or 8 bytes.
        INTERNAL_IP4_SUBNET = 13,
        /// A list of attribute types.
        SUPPORTED_ATTRIBUTES = 14,
        /// Address and prefix length, 17 bytes.
        INTERNAL_IP6_SUBNET = 15,
    }
}

registry! {
    /// Encoding of a certificate or of what is asked for (RFC 7296 §3.6).
    CertEncoding(u8) {
        /// X.509, to sign with.
        X509_SIGNATURE = 4,
        /// Certificate revocation list.
        CRL = 7,
        /// SHA-1 and URL of an X.509 certificate.
        HASH_URL_X509 = 12,
        /// SHA-1 and URL of a bundle.
        HASH_URL_BUNDLE = 13,
        /// OCSP content (RFC 4806).
        OCSP = 14,
    }
}

registry! {
    /// Hash algorithms in SIGNATURE_HASH_ALGORITHMS (RFC 7427 §7).
    HashId(u16) {
        /// SHA-1.
        SHA1 = 1,
        /// SHA-256.
        SHA2_256 = 2,
        /// SHA-384.
        SHA2_384 = 3,
        /// SHA-512.
        SHA2_512 = 4,
        /// The signature scheme hashes by itself (RFC 8420).
        IDENTITY = 5,
    }
}
