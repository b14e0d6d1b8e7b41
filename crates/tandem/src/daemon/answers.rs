//! The gateway's answers in the words of the control socket.

use gateway::{Answer, Refusal};

use crate::control_socket::{Failure, Fault, Move, RekeyWhat, Request, Response, TunnelUp};

/// A request for the gateway.
pub(super) fn request(request: &Request) -> gateway::Request {
    match request {
        Request::Status {} => gateway::Request::Status,
        Request::Summary {} => gateway::Request::Summary,
        Request::Failover { endpoint } => gateway::Request::Failover { endpoint: endpoint.clone() },
        Request::Drain {} => gateway::Request::Drain,
        Request::Undrain {} => gateway::Request::Undrain,
        Request::Flows {} => gateway::Request::Flows,
        Request::Up { connection } => gateway::Request::Up { connection: connection.clone() },
        Request::Down { connection, purge } => {
            gateway::Request::Down { connection: connection.clone(), purge: *purge }
        }
        Request::Rekey { connection, what } => gateway::Request::Rekey {
            connection: connection.clone(),
            ike: *what != RekeyWhat::Child,
            children: *what != RekeyWhat::Ike,
        },
    }
}

/// The response to a request. `purged`: the rules against clear text were removed as well.
pub(super) fn response(
    request: &Request,
    answer: Answer,
    from: &str,
    to: &str,
    purged: bool,
) -> Response {
    let connection = match request {
        Request::Up { connection }
        | Request::Down { connection, .. }
        | Request::Rekey { connection, .. } => connection.clone(),
        Request::Status {}
        | Request::Summary {}
        | Request::Failover { .. }
        | Request::Drain {}
        | Request::Undrain {}
        | Request::Flows {} => String::new(),
    };
    let moves = |one: gateway::Moved| Move {
        endpoint: one.endpoint,
        from: from.to_owned(),
        to: to.to_owned(),
        term: one.term.0,
        took_ms: u64::try_from(one.took.as_millis()).unwrap_or(u64::MAX),
    };
    match answer {
        Answer::Status(status) => Response::Status { status },
        Answer::Moved(moved) => {
            Response::Failover { moves: moved.into_iter().map(moves).collect() }
        }
        Answer::Drained { moved, withdrawn } => Response::Drain {
            instance: from.to_owned(),
            moves: moved.into_iter().map(moves).collect(),
            withdrawn,
        },
        Answer::Undrained => Response::Undrain { instance: from.to_owned() },
        Answer::Flows(flows) => Response::Flows { flows },
        Answer::Up(tunnels) => Response::Up {
            connection,
            tunnels: tunnels
                .into_iter()
                .map(|up| TunnelUp {
                    connection: up.connection,
                    endpoint: up.endpoint,
                    state: up.state,
                })
                .collect(),
        },
        Answer::Down { closed } => Response::Down { connection, closed, purged },
        Answer::Rekey { ike, children } => Response::Rekey { connection, ike, children },
        Answer::Refused { why, text, hint } => {
            let fault = match why {
                Refusal::UnknownName => Fault::UnknownName,
                Refusal::NotOwner => Fault::NotOwner,
                Refusal::NotReady => Fault::NotReady,
                Refusal::Failed => Fault::Failed,
            };
            let failure = Failure::new(fault, text);
            Response::Error(match hint {
                Some(hint) => failure.hint(hint),
                None => failure,
            })
        }
    }
}
