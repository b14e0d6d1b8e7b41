#!/usr/bin/python3
"""Known answers from an independent implementation: scapy 2.5.0 of Debian's python3-scapy.

    /usr/bin/python3 crates/wire/tests/data/vectors.py > crates/wire/tests/data/vectors.txt

Each line is a name and the bytes in hexadecimal; tests/known_answers.rs says what they must mean.
`tshark` (text2pcap -u 500,500) dissects all ike_* lines; it complains only of the certificate, which is none.
Lengths given by hand (IDi, CP, IPv6 selector, Notify with SPI) are those that scapy 2.5.0 gets wrong or cannot count.
"""
from scapy.all import *
from scapy.contrib.ikev2 import *

I, R = bytes.fromhex("1122334455667788"), bytes.fromhex("99aabbccddeeff00")


def show(name, packet):
    print(name, bytes(packet).hex())


def transforms(*items):
    chain = None
    for i, (kind, number, bits) in enumerate(items):
        t = IKEv2_payload_Transform(
            next_payload=0 if i == len(items) - 1 else 3, transform_type=kind, transform_id=number
        )
        if bits:
            t.key_length = bits
            t.length = 12
        chain = t if chain is None else chain / t
    return chain


def proposal(number, proto, items, spi=b"", last=True):
    return IKEv2_payload_Proposal(
        next_payload=0 if last else 2, proposal=number, proto=proto, SPIsize=len(spi), SPI=spi,
        trans_nb=len(items), trans=transforms(*items),
    )


ike_offer = proposal(1, 1, [(1, 20, 256), (2, 6, None), (4, 31, None), (4, 19, None)], last=False) / proposal(
    2, 1, [(1, 28, None), (2, 5, None), (2, 7, None), (4, 20, None)]
)
show(
    "ike_sa_init_request",
    IKEv2(init_SPI=I, next_payload=33, exch_type=34, flags="Initiator", id=0)
    / IKEv2_payload_SA(next_payload=34, prop=ike_offer)
    / IKEv2_payload_KE(next_payload=40, group=31, load=bytes(range(32)))
    / IKEv2_payload_Nonce(next_payload=41, load=bytes(range(100, 132)))
    / IKEv2_payload_Notify(next_payload=41, type=16388, load=b"\xa1" * 20)
    / IKEv2_payload_Notify(next_payload=41, type=16389, load=b"\xa2" * 20)
    / IKEv2_payload_Notify(next_payload=43, type=16431, load=bytes.fromhex("0002000300040005"))
    / IKEv2_payload_VendorID(vendorID=b"tandem test"),
)
show(
    "ike_sa_init_invalid_ke",
    IKEv2(init_SPI=I, resp_SPI=bytes(8), next_payload=41, exch_type=34, flags="Response", id=0)
    / IKEv2_payload_Notify(type=17, load=b"\x00\x14"),
)
esp_offer = proposal(1, 3, [(1, 20, 256), (5, 0, None)], spi=bytes.fromhex("c0ffee01"))
tsi = [
    IPv4TrafficSelector(IP_protocol_ID=0, starting_address_v4="10.1.0.0", ending_address_v4="10.1.0.255"),
    IPv4TrafficSelector(
        IP_protocol_ID=6, start_port=80, end_port=443, starting_address_v4="10.1.1.7", ending_address_v4="10.1.1.9"
    ),
]
tsr = [
    IPv6TrafficSelector(length=40, IP_protocol_ID=0, starting_address_v6="fd00::", ending_address_v6="fd00::ffff:ffff:ffff:ffff"),
    IPv4TrafficSelector(
        IP_protocol_ID=17, start_port=65535, end_port=0, starting_address_v4="0.0.0.0", ending_address_v4="255.255.255.255"
    ),
]
cfg = [ConfigurationAttribute(type=1), ConfigurationAttribute(type=3, value=b"\x0a\x01\x00\x35")]
# What an IKE_AUTH request holds once opened, here in a clear message.
show(
    "ike_auth_opened",
    IKEv2(init_SPI=I, resp_SPI=R, next_payload=35, exch_type=35, flags="Initiator", id=1)
    / IKEv2_payload_IDi(next_payload=37, length=22, IDtype="FQDN", ID=b"branch.example")
    / IKEv2_payload_CERT_STR(next_payload=38, cert_type=4, cert_data=b"\x30\x03\x02\x01\x01")
    / IKEv2_payload_CERTREQ(next_payload=36, cert_type=4, cert_data=b"\xcc" * 20)
    / IKEv2_payload_IDr(next_payload=39, IDtype="IPv4_addr", ID="203.0.113.10")
    / IKEv2_payload_AUTH(next_payload=47, auth_type=2, load=b"\xbb" * 48)
    / IKEv2_payload_CP(next_payload=33, length=20, CFGType=1, attributes=cfg)
    / IKEv2_payload_SA(next_payload=44, prop=esp_offer)
    / IKEv2_payload_TSi(next_payload=45, traffic_selector=tsi)
    / IKEv2_payload_TSr(next_payload=41, traffic_selector=tsr)
    / IKEv2_payload_Notify(next_payload=41, type=16420)
    / IKEv2_payload_Notify(next_payload=0, type=16384)
)
show(
    "ike_rekey_child_opened",
    IKEv2(init_SPI=I, resp_SPI=R, next_payload=41, exch_type=36, flags="Initiator+Response", id=7)
    / IKEv2_payload_Notify(next_payload=33, length=12, proto=3, SPIsize=4, type=16393, SPI=bytes.fromhex("c0ffee01"))
    / IKEv2_payload_SA(
        next_payload=40,
        prop=proposal(1, 1, [(1, 20, 128), (2, 5, None), (4, 19, None)], spi=bytes.fromhex("0102030405060708")),
    )
    / IKEv2_payload_Nonce(next_payload=0, load=b"\x5a" * 16),
)
show(
    "ike_delete_opened",
    # scapy's Delete is only a generic body: protocol ESP, SPI size 4, two SPIs.
    IKEv2(init_SPI=I, resp_SPI=R, next_payload=42, exch_type=37, id=2)
    / IKEv2_payload_Delete(vendorID=bytes.fromhex("03040002c0ffee01c0ffee02")),
)
show(
    "ike_sealed",
    IKEv2(init_SPI=I, resp_SPI=R, next_payload=46, exch_type=37, flags="Initiator", id=3)
    / IKEv2_payload_Encrypted(next_payload=42, load=bytes(range(8)) + b"\xee" * 9 + b"\xdd" * 16),
)
show(
    "ike_fragment",
    IKEv2(init_SPI=I, resp_SPI=R, next_payload=53, exch_type=35, flags="Initiator", id=1)
    / IKEv2_payload_Encrypted_Fragment(
        next_payload=35, frag_number=1, frag_total=3, load=bytes(range(8)) + b"\xee" * 30 + b"\xdd" * 16
    ),
)
show("ip_udp4", IP(src="10.1.0.2", dst="10.2.0.3", ttl=64, flags="DF", id=0) / UDP(sport=4500, dport=53) / b"abc")
show("ip_udp6", IPv6(src="fd00::2", dst="fd01::3", hlim=64) / UDP(sport=4500, dport=53) / b"abc")
show(
    "ip_tcp4_options",
    IP(src="10.1.0.2", dst="10.2.0.3", tos=0xB9, options=[IPOption_Router_Alert()])
    / TCP(sport=1025, dport=443, seq=7, ack=9, flags="PA", window=1234, options=[("MSS", 1400)])
    / b"hello",
)
show("ip_icmp4", IP(src="10.1.0.2", dst="10.2.0.3") / ICMP(type=3, code=4) / b"xxx")
show(
    "ip_tcp6_extensions",
    IPv6(src="fd00::2", dst="fd01::3", tc=0x2E)
    / IPv6ExtHdrHopByHop()
    / IPv6ExtHdrDestOpt(options=[PadN(optdata=b"\0" * 10)])
    / TCP(sport=1, dport=2),
)
show("ip_icmp6", IPv6(src="fd00::2", dst="fd01::3") / ICMPv6EchoRequest(id=1, seq=2))
first, later = fragment(IP(src="10.1.0.2", dst="10.2.0.3", id=5) / UDP(sport=9, dport=10) / (b"z" * 30), fragsize=24)
show("ip_fragment4_first", first)
show("ip_fragment4_later", later)
big = IPv6(src="fd00::2", dst="fd01::3") / IPv6ExtHdrFragment(id=6) / UDP(sport=9, dport=10) / (b"z" * 100)
first6, later6 = fragment6(big, 136)
show("ip_fragment6_first", first6)
show("ip_fragment6_later", later6)
